"""Engines after changes: of layouts, of weights, of code that heads and policies call. Nothing stale answers."""

import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import offramp
from offramp.engines.lower import lowered
from offramp.errors import MissingExtra, NotStageable, ShapeError, ValueRangeError
from offramp.policies import Step
from offramp.units import fingerprint, parts_of


def made(name, model, **options):
    try:
        return offramp.engine(model, name, **options)
    except (MissingExtra, NotStageable) as error:
        pytest.skip(str(error))


class Turned(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def turning():
    """A network whose tap is a view, so that what goes on is not dense."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), Turned(), nn.Linear(6, 4), nn.Flatten(), nn.Linear(24, 3))
    return offramp.attach(network, at=("2",), head=offramp.TokenHead("mean"), example=torch.randn(3, 6, 5)).eval()


@pytest.mark.parametrize("name", ["compiled", "onnx", "onnx-file"])
def test_any_layout_of_the_inputs_gives_the_same_answers(name):
    model = turning()
    model_input = torch.randn(9, 6, 5)
    surest = torch.softmax(model(model_input)[0], -1).amax(-1)
    policy = offramp.MaxProb((surest.median().item(), 0.0))  # half of the rows go on
    engine, live = made(name, model), offramp.Runtime(model, policy)
    run = offramp.Runtime(model, policy, engine)
    layouts = {
        "dense": model_input,
        "wider": torch.randn(9, 6, 10)[:, :, :5],
        "every other": torch.randn(18, 6, 5)[::2],
        "turned": torch.randn(9, 5, 6).transpose(1, 2),
        "spread": torch.randn(1, 6, 5).expand(9, 6, 5),
    }
    for x in layouts.values():
        ours, theirs = run(x), live(x)
        assert torch.equal(ours.exit, theirs.exit)
        torch.testing.assert_close(ours.probabilities, theirs.probabilities, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(engine.whole(x), model.plain(x), rtol=1e-4, atol=1e-5)
    assert set(run(model_input).exit.tolist()) == {0, 1}


def test_what_is_made_later_fits_what_was_made_first(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    x, policy = torch.randn(4, 6, 5), offramp.MaxProb(0.5)
    for name in ("onnx", "onnx-file"):
        model = turning()
        engine = made(name, model)
        run = offramp.Runtime(model, policy, engine)
        before = run(x).probabilities
        with torch.no_grad():
            model.backbone[0].weight.mul_(-3)
        torch.testing.assert_close(run(x).probabilities, before)
        with pytest.raises(NotStageable, match=f"changed after the engine {name} was made"):
            engine.whole(x)
        again = offramp.Runtime(model, policy, name)
        torch.testing.assert_close(again(x).probabilities, offramp.Runtime(model, policy)(x).probabilities)


def act(x):
    return torch.tanh(x)


class Own(nn.Module):
    """A head with code of its own: what it calls, and tensors that are no parameters, are part of it."""

    def __init__(self):
        super().__init__()
        self.act, self.scale, self.linear = torch.tanh, [torch.ones(3)], nn.Linear(6, 3)

    def forward(self, x):
        return self.scale[0] * self.linear(act(self.act(x)))


def test_a_model_is_told_apart_by_what_its_heads_compute(monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    model = offramp.attach(network, at=("1",), head=lambda shape, classes: Own(), example=torch.randn(3, 5)).eval()
    head = model.heads[0]
    marks = [fingerprint(model), fingerprint(model)]
    assert marks[0] == marks[1] is not None
    head.act = torch.neg
    marks.append(fingerprint(model))
    head.scale = [torch.full((3,), 2.0)]
    marks.append(fingerprint(model))
    monkeypatch.setattr(sys.modules[__name__], "act", torch.sin)
    marks.append(fingerprint(model))
    handle = head.register_forward_hook(lambda module, given, output: output + 1)
    marks.append(fingerprint(model))
    handle.remove()
    with torch.no_grad():
        model.backbone[2].bias.add_(1)
    marks.append(fingerprint(model))
    assert len(set(marks)) == len(marks) - 1


@dataclass(frozen=True)
class Rule:
    """A policy that is none of ours."""

    needs: ClassVar[tuple[str, ...]] = ()
    per_exit: ClassVar[tuple[str, ...]] = ("thresholds",)
    sign: ClassVar[float] = 1.0
    thresholds: tuple[float, ...] = (0.5, 0.0)
    below: bool = False
    enabled: None = None

    def init(self, seen):
        return ()

    def step(self, k, seen, state):
        score = self.sign * torch.softmax(seen.logits, -1).amax(-1)
        stop = score < self.thresholds[k] if self.below else score >= self.thresholds[k]
        return Step(stop, score, seen.logits, ())


def test_policies_of_ones_own_are_not_mixed_up_and_stop_as_graphs_do(monkeypatch):
    model, x = turning(), torch.randn(9, 6, 5)
    middle = torch.softmax(model(x)[0], -1).amax(-1).median().item()
    engine = made("onnx", model)
    for sign in (1.0, -1.0):
        monkeypatch.setattr(Rule, "sign", sign)  # the same fields, other code
        policy = Rule((sign * middle, -9.0))
        ours, theirs = offramp.Runtime(model, policy, engine)(x), offramp.Runtime(model, policy)(x)
        assert torch.equal(ours.exit, theirs.exit)
        assert set(ours.exit.tolist()) == {0, 1}
    with pytest.raises(NotStageable, match="Rule does not stop where its score is at least its threshold at exit 0"):
        offramp.Runtime(model, Rule((middle, 9.0), below=True), engine)


@pytest.mark.parametrize("name", ["eager", "compiled", "onnx", "onnx-file"])
def test_numbers_are_never_made_whole(name):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(20, 6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    model = offramp.attach(network, at=("1",), head=offramp.TokenHead("mean"), example=torch.randint(0, 20, (3, 4)))
    run = offramp.Runtime(model.eval(), offramp.MaxProb(0.4), made(name, model))
    x = torch.randint(0, 20, (5, 4))
    assert torch.equal(run(x.int()).probabilities, run(x).probabilities)
    assert torch.equal(run(x.to(torch.uint8)).exit, run(x).exit)
    for wrong in (torch.rand(5, 4), x.to(torch.complex64)):
        with pytest.raises(ShapeError, match=r"float32|complex64"):
            run(wrong)
    with pytest.raises(ValueRangeError, match=r"vocabulary|table"):
        run(x + 20)


def test_an_engine_is_for_one_model():
    model, other = turning(), turning()
    engine = offramp.engine(model)
    rows = (torch.randn(4, 6, 5), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueRangeError, match="made for another model"):
        offramp.record(other, rows, engine=engine, progress=False)
    with pytest.raises(ValueRangeError, match="no precision: the engine has its own"):
        offramp.record(model, rows, engine=engine, precision="bf16", progress=False)
    with pytest.raises(ValueRangeError, match="made for another model"):
        offramp.measure(other, rows[0], engine=engine)


def test_bf16_follows_the_weights():
    model, x = turning(), torch.randn(4, 6, 5)
    engine = offramp.engine(model, "eager", precision="bf16")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2).add_(0.05)
    assert torch.equal(engine.says(x)[0], offramp.engine(model, "eager", precision="bf16").says(x)[0])
    model.backbone[3] = nn.Linear(6, 4).eval()
    for precision in ("fp32", "bf16"):
        engine = offramp.engine(model, "eager", precision=precision)
        model.backbone[3] = nn.Linear(6, 4).eval()
        torch.testing.assert_close(engine.whole(x), model.plain(x), rtol=0.05, atol=0.05)


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        scale, shift = torch.stack([self.scale, self.shift])
        return self.linear(x * scale + shift)


def test_only_weights_of_products_are_cast():
    model = offramp.attach(nn.Sequential(Stacked(), nn.Linear(6, 3)), at=("0",), example=torch.randn(3, 6)).eval()
    kinds = {name: p.dtype for name, p in lowered(parts_of(model)).uncut.module.named_parameters()}
    assert {dtype for name, dtype in kinds.items() if "scale" in name or "shift" in name} == {torch.float32}
    assert torch.bfloat16 in kinds.values()
