import itertools
import json
import random
from dataclasses import replace

import pytest

from offramp.cost import Budget, CostModel, TimedCosts
from offramp.errors import FormatError, ShapeError, ValueRangeError

TIMED = CostModel(
    stage=(0.3, 0.3, 0.4),
    head=(0.05, 0.1, 0.0),
    plain_flops=1000.0,
    timed=(
        TimedCosts(1, 10.0, (3.0, 3.0, 4.0), (0.5, 0.5, 0.0), 0.25, 0.1),
        TimedCosts(4, 16.0, (4.0, 5.0, 7.0), (1.0, 1.0, 0.0), 0.5),
        TimedCosts(8, 24.0, (6.0, 8.0, 10.0), (1.0, 2.0, 0.0), 0.5),
    ),
    machine="a test",
)


def test_cumulative():
    assert TIMED.cumulative() == (0.35, 0.75, 1.15)
    assert TIMED.cumulative((False, True, True)) == (0.3, 0.7, 1.1)
    assert TIMED.cumulative((False, False, False)) == (0.3, 0.6, 1.0)  # the last is always on
    assert TIMED.visited((False, True, False)) == (False, True, True)
    with pytest.raises(ShapeError, match="2 flags"):
        TIMED.cumulative((True, True))


def test_from_costs():
    assert CostModel.from_costs((2.31, 4.15, 4.93)).cumulative() == pytest.approx((0.46856, 0.841785, 1.0), abs=1e-5)
    assert CostModel.from_costs((1, 3), plain=2).cumulative() == (0.5, 1.5)
    for bad in ((), (0.0, 1.0), (1.0, 0.5), (-1.0, 1.0), (float("nan"), 1.0), (1.0, float("inf"))):
        with pytest.raises(ValueRangeError):
            CostModel.from_costs(bad)
    with pytest.raises(ValueRangeError):
        CostModel.from_costs((1.0,), plain=-1.0)


def test_spent_and_plain():
    shares = (0.5, 0.25, 0.25)
    assert TIMED.spent(shares, Budget(fraction=1)) == pytest.approx(0.175 + 0.1875 + 0.2875)
    assert TIMED.spent(shares, Budget(flops=1)) == pytest.approx(650.0)
    assert TIMED.plain(Budget(fraction=1)) == 1.0
    assert TIMED.plain(Budget(flops=1)) == pytest.approx(1000.0)
    assert TIMED.plain(Budget(ms=1, batch_size=4)) == pytest.approx(16000.0)
    # between sizes linear, beyond the last proportional
    assert TIMED.plain(Budget(ms=1, batch_size=6)) == pytest.approx(20000.0)
    assert TIMED.plain(Budget(ms=1, batch_size=16)) == pytest.approx(48000.0)


def test_seconds_by_hand():
    # batch 1: exit 0 always 3 + .5 + .25; exit 1 by half 3 + .5 + .25; the end by a quarter 4 + .25
    assert TIMED.seconds((0.5, 0.25, 0.25), 1) == pytest.approx(3.75 + 0.5 * 3.75 + 0.25 * 4.25)
    assert TIMED.seconds((1.0, 0.0, 0.0), 4) == pytest.approx(4 + 1 + 0.5)
    assert TIMED.seconds((0.0, 0.0, 1.0), 4, (False, False, True)) == pytest.approx(4 + 5 + 7 + 0.5)
    # two rows, one in two goes on: 0, 1 or 2 rows with chances 1/4, 1/2, 1/4; two rows cost a third of the way to four
    stage = 0.5 * 3 + 0.25 * (3 + 2 / 3)
    extra = 0.5 * 0.75 + 0.25 * (0.5 + 0.5 / 3 + 0.25 + 0.25 / 3)
    first = 3 + 1 / 3 + 0.5 + 0.5 / 3 + 0.25 + 0.25 / 3
    assert TIMED.seconds((0.5, 0.5, 0.0), 2) == pytest.approx(first + stage + extra)


@pytest.mark.parametrize(("batch", "enabled"), [(1, None), (6, None), (13, (True, False, True))])
def test_seconds_against_drawn_batches(batch, enabled):
    shares, rnd, total, draws = (0.35, 0.25, 0.4), random.Random(0), 0.0, 20_000
    if enabled is not None:
        shares = (0.35, 0.0, 0.65)

    def at(points, rows):
        for (low, a), (high, b) in itertools.pairwise(points):
            if rows <= low:
                return a
            if rows <= high:
                return a + (b - a) * (rows - low) / (high - low)
        return points[-1][1] * rows / points[-1][0]

    def time_of(k, rows):
        pick = [(t.batch_size, t.stage_s[k] + (enabled is None or enabled[k]) * (t.head_s[k] + t.step_s))
                for t in TIMED.timed]  # fmt: skip
        return at(pick, rows)

    for _ in range(draws):
        rows = batch
        for k in range(3):
            if not rows:
                break
            total += time_of(k, rows)
            reach = 1 - sum(shares[:k])
            rows = sum(rnd.random() >= shares[k] / reach for _ in range(rows))
    assert TIMED.seconds(shares, batch, enabled) == pytest.approx(total / draws, rel=0.01)


def test_shares_that_sum_to_one_only_nearly():
    assert TIMED.seconds((0.1,) * 2 + (0.8,), 8) < TIMED.seconds((0.0, 0.0, 1.0), 8)
    assert TIMED.seconds((0.7, 0.1 + 0.2, 0.0), 8) == pytest.approx(TIMED.seconds((0.7, 0.3, 0.0), 8))


def test_promise():
    assert TIMED.promise((0.0, 0.0, 1.0), 4) == pytest.approx(1.0)  # 16 / (4 + 5 + 7): no heads, no steps
    assert TIMED.promise((1.0, 0.0, 0.0), 4) == pytest.approx(4.0)
    assert TIMED.promise((0.5, 0.25, 0.25), 1) == pytest.approx(10 / (3 + 1.5 + 1))


def test_unmeasured():
    bare = CostModel.from_costs((0.5, 1.0))
    for ask in (lambda: bare.seconds((0.5, 0.5), 1), lambda: bare.promise((0.5, 0.5), 1),
                lambda: bare.spent((0.5, 0.5), Budget(flops=1)), lambda: bare.plain(Budget(ms=1))):  # fmt: skip
        with pytest.raises(ValueRangeError, match="measure"):
            ask()


def test_constructors():
    for bad in ({}, {"fraction": 0.5, "ms": 1.0}, {"fraction": 0}, {"ms": -1.0}, {"flops": float("nan")},
                {"fraction": float("inf")}, {"fraction": 0.5, "batch_size": 0}):  # fmt: skip
        with pytest.raises(ValueRangeError):
            Budget(**bad)
    with pytest.raises(ShapeError):
        CostModel(stage=(1.0,), head=(0.0, 0.0))
    with pytest.raises(ShapeError):
        CostModel(stage=(), head=())
    with pytest.raises(ShapeError, match="batch 1"):
        CostModel(stage=(1.0,), head=(0.0,), timed=TIMED.timed)
    for stage in ((float("nan"),), (-1.0,), (0.0,)):
        with pytest.raises(ValueRangeError):
            CostModel(stage=stage, head=(0.0,))
    with pytest.raises(ValueRangeError, match="rising"):
        replace(TIMED, timed=TIMED.timed[::-1])
    for change in ({"batch_size": 0}, {"plain_s": 0.0}, {"stage_s": (-1.0, 0.0, 0.0)}, {"step_s": float("nan")}):
        with pytest.raises(ValueRangeError):
            replace(TIMED.timed[0], **change)
    assert str(Budget(fraction=0.5)) == "0.5 of the plain model"
    assert str(Budget(flops=1e9)) == "1e+09 FLOPs a row"
    assert str(Budget(ms=2.5, batch_size=8)) == "2.5 ms at batch 8"


def test_round_trip_and_damaged_files(tmp_path):
    path = TIMED.save(tmp_path / "c.json")
    assert CostModel.load(path) == TIMED
    value = json.loads(path.read_text())
    bad = [{"kind": "x"}, {"version": 2}, {"fields": None}]
    bad += [
        {"fields": {**value["fields"], **change}}
        for change in ({"stage": "abc"}, {"stage": [1]}, {"extra": 1}, {"timed": 5}, {"timed": [{}]},
                       {"stage": [10**400] * 3},
                       {"timed": [{**value["fields"]["timed"][0], "plain_s": "x"}]}, {"head": None},
                       {"timed": [[1]]}, {"timed": value["fields"]["timed"][::-1]})
    ]  # fmt: skip
    for change in bad:
        path.write_text(json.dumps({**value, **change}))
        with pytest.raises(FormatError):
            CostModel.load(path)
    path.write_text(json.dumps(value)[:-20])
    with pytest.raises(FormatError):
        CostModel.load(path)
