"""Models of the table in one ONNX file and in sessions: rows leave where torch lets them leave.

All of them with OFFRAMP_TABLE=all, in about five minutes; a few kinds otherwise.
"""

import os

import pytest
import torch
from attach_models import CASES
from test_table import SIZES, attached

import offramp
from offramp.inputs import batch_size, select_rows

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

KINDS = ("sequential", "ushape", "bert_mean", "albert", "swin")
NAMES = tuple(CASES) if os.environ.get("OFFRAMP_TABLE") == "all" else KINDS


def spread(name):
    """A policy under which about half of the rows leave at each exit, and are not near its thresholds."""
    model, rows = attached(name), CASES[name].inputs(40, seed=3)
    with torch.no_grad():
        surest = torch.softmax(model(rows), -1).amax(-1)
    ordered = surest.sort(dim=1).values
    gaps = ordered[:, 11:29] - ordered[:, 10:28]
    places = gaps.argmax(dim=1)
    return offramp.MaxProb(tuple(float((ordered[k, 10 + p] + ordered[k, 11 + p]) / 2) for k, p in enumerate(places)))


@pytest.mark.parametrize("name", NAMES)
def test_onnx_leaves_where_torch_does(name):
    model, policy, case = attached(name), spread(name), CASES[name]
    live = offramp.Runtime(model, policy)
    runs = [offramp.Runtime(model, policy, engine) for engine in ("onnx", "onnx-file")]
    used = set()
    for batch, tokens in ((40, 9), *SIZES) if case.text else ((40, 9), (1, 9), (7, 9)):
        rows = case.inputs(batch, tokens, seed=3)
        theirs = live(rows)
        near = (theirs.score - torch.tensor(policy.thresholds)[theirs.exit]).abs() < 1e-5
        for run in runs:
            ours = run(rows)
            assert torch.equal(ours.exit[~near], theirs.exit[~near])
            same = ours.exit == theirs.exit
            torch.testing.assert_close(ours.probabilities[same], theirs.probabilities[same], rtol=1e-4, atol=1e-5)
        used |= set(theirs.exit.tolist())
    assert len(used) > 1


@pytest.mark.parametrize("name", ["bert_mean", "swin"])
def test_a_row_in_int8_does_not_depend_on_its_neighbours(name):
    model, case = attached(name), CASES[name]
    rows = case.inputs(6, seed=5)
    engine = offramp.engine(model, "onnx", precision="int8")
    together, _ = engine.says(rows)
    for i in range(batch_size(rows)):
        alone, _ = engine.says(select_rows(rows, torch.tensor([i])))
        torch.testing.assert_close(alone[:, 0], together[:, i], rtol=1e-5, atol=1e-5)
