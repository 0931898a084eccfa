"""The main job on a small part of the digits: every figure is there, and what it left behind can be used again."""

import json

import pytest

from offramp import CostModel, ExitTrace, ValueRangeError
from offramp.quickstart import quickstart
from offramp.runs import load_run


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("quick")
    result = quickstart("digits", out=out, epochs=1, limit=200, batch_sizes=(1, 8), seconds=0.5, progress=False)
    return out, result


def test_every_figure_is_there(found):
    _, result = found
    assert len(result.exits) == 3
    assert [row.family for row in result.table] == ["max-prob", "beem-a", "eenet"]
    assert {(s.policy, s.batch_size) for s in result.speeds} == {
        (name, size) for name in ("max-prob", "beem-a", "eenet") for size in (1, 8)
    }
    assert [s.batch_size for s in result.unused] == [1, 8]
    assert all(s.shares[-1] == 1.0 for s in result.unused)
    assert all(row.achieved <= 0.5 + 1e-9 for row in result.table)


def test_live_runs_leave_where_the_simulator_says(found):
    _, result = found
    for compared, near, differs, _ in result.parity.values():
        assert differs == 0
        assert compared == 3 * result.rows[2]
        assert near < result.rows[2]


def test_what_it_left_can_be_used(found):
    out, result = found
    stored = json.loads((out / "result.json").read_text())
    assert stored["table"][0]["accuracy"] == result.table[0].accuracy
    assert ExitTrace.load(out / "test.safetensors").rows == result.rows[2]
    assert CostModel.load(out / "costs.json").exits == 3
    _, model, _ = load_run(out)
    assert model.exits == 3


def test_a_second_call_does_not_train_again(found):
    out, result = found
    few = {"batch_sizes": (8,), "families": ["max-prob"], "seconds": 0.2, "progress": False}
    again = quickstart("digits", out=out, epochs=1, limit=200, **few)
    assert again.train_s == result.train_s  # the checkpoint's own figure
    assert again.exits == result.exits


def test_an_unknown_task_is_named():
    with pytest.raises(ValueRangeError, match="expected one of digits"):
        quickstart("mnist")
