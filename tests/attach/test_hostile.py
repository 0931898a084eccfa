"""Models and calls that must not pass in silence."""

import pytest
import torch
from torch import nn

from offramp import MaxProb, NotStageable, Runtime, ShapeError, attach
from offramp.graph import three_rows


class Mixing(nn.Module):
    """Adds to every row something of another one, behind the tap."""

    def __init__(self, mix) -> None:
        super().__init__()
        self.mix = mix
        self.a, self.o = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.o(h + 5 * self.mix(h))


MIXES = {
    "flip": lambda h: h.flip(0),
    "reversed index": lambda h: h[torch.arange(h.shape[0] - 1, -1, -1)],
    "roll": lambda h: h.roll(1, 0),
    "batch statistics": lambda h: torch.nn.functional.batch_norm(h, None, None, training=True),
}


@pytest.mark.parametrize("example", [torch.randn(8, 8), torch.zeros(2, 8), torch.ones(4, 8)], ids=["random", "0", "1"])
@pytest.mark.parametrize("name", MIXES)
def test_rows_that_mix_are_found_whatever_the_example(name, example):
    model = attach(Mixing(MIXES[name]).eval(), at=("a",), example=example)
    with pytest.raises(NotStageable):
        Runtime(model, MaxProb(0.5))
    assert model(torch.randn(4, 8)).shape == (2, 4, 3)  # it still trains, records and simulates


def test_equal_rows_of_an_example_are_told_apart():
    rows = three_rows(torch.zeros(2, 8))
    assert len(rows.unique(dim=0)) == 3
    tokens = three_rows({"input_ids": torch.tensor([[1, 2, 3], [1, 2, 3]]), "attention_mask": torch.ones(2, 3).long()})
    assert len(tokens["input_ids"].unique(dim=0)) == 3
    kept = torch.randn(5, 8)
    assert torch.equal(three_rows(kept), kept[:3])


@pytest.fixture
def model():
    layers = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    return attach(layers, at=("0",), example=torch.randn(2, 8)).eval()


def test_recut_sees_what_no_parameter_shows(model):
    run, rows = Runtime(model, MaxProb(2.0)), torch.randn(5, 8)
    before = run(rows).probabilities
    model.backbone[1].eps = 100.0
    assert torch.equal(run(rows).probabilities, before)  # as documented
    model.recut()
    with torch.no_grad():
        torch.testing.assert_close(run(rows).probabilities, torch.softmax(model.plain(rows), -1))


def test_wrong_kinds_are_named(model):
    with pytest.raises(ShapeError, match=r"is torch\.float64; the stages were cut for torch\.float32"):
        Runtime(model, MaxProb(0.5))(torch.randn(2, 8).double())
    with pytest.raises(ShapeError, match="1 output a row"):
        attach(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1)), at=("0",), example=torch.randn(2, 8))


def test_mistakes_of_kind_without_the_type_checker(tmp_path):
    """What a user sees, whose annotations nobody checks."""
    import subprocess
    import sys

    code = """
import torch, offramp
from torch import nn
trace, costs = offramp.ExitTrace(logits=torch.randn(3, 20, 2)), offramp.CostModel.from_costs((0.2, 0.6, 1.0))
B = offramp.Budget(fraction=0.5)
m = offramp.attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), at=("0",), example=torch.randn(2, 8))
run = offramp.Runtime(m.eval(), offramp.MaxProb(0.5))
calls = {
    "a number for a budget": lambda: offramp.calibrate(offramp.BEEM, trace, costs, 0.5),
    "a tensor for a trace": lambda: offramp.calibrate(offramp.MaxProb, trace.logits, costs, B),
    "a tuple for costs": lambda: offramp.calibrate(offramp.MaxProb, trace, (0.2, 0.6, 1.0), B),
    "one weight": lambda: offramp.calibrate(offramp.BEEM, trace, costs, B, weights=0.5),
    "words for weights": lambda: offramp.calibrate(offramp.BEEM, trace, costs, B, weights=("a", "b", "c")),
    "letters for flags": lambda: offramp.calibrate(offramp.MaxProb, trace, costs, B, enabled="TFT"),
    "no policy": lambda: offramp.Runtime(m, None),
    "a class for a policy": lambda: offramp.Runtime(m, offramp.MaxProb),
    "a plain model": lambda: offramp.Runtime(nn.Linear(2, 2), offramp.MaxProb(0.5)),
    "a list for inputs": lambda: run([[1.0] * 8]),
    "nothing for inputs": lambda: run(None),
}
calls["a truth value for an amount"] = lambda: offramp.Budget(fraction=True)
import numpy
if offramp.Budget(fraction=numpy.float32(0.5)).amount != 0.5:
    print("NumPy's numbers are numbers")
for name, call in calls.items():
    try:
        call()
        print("passed in silence:", name)
    except offramp.OfframpError:
        pass
    except Exception as error:
        print("foreign:", name, type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == ""
