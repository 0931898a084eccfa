"""Policies side by side: what is calibrated is not what is judged, and rows of another kind are told."""

import pytest
import torch

from offramp import Budget, CostModel, DataError, ErrorRate, ExitTrace, ValueRangeError
from offramp.compare import Pool, calibrate_choice, compare, compare_pooled, drift, families_for, halves
from offramp.simulate import simulate

COSTS = CostModel.from_costs((0.25, 0.6, 1.0))


def made(rows: int, *, hard: float = 0.0, seed: int = 0) -> ExitTrace:
    """A trace whose exits get better with depth; `hard` takes from every row's evidence."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (rows,), generator=generator)
    ease = torch.rand(rows, generator=generator) * (1 - hard)
    noise = torch.randn(3, rows, 4, generator=generator)
    depth = torch.tensor([1.5, 3.0, 5.0])[:, None, None]
    truth = torch.nn.functional.one_hot(labels, 4) * ease[:, None]
    return ExitTrace(logits=noise + depth * truth, labels=labels)


def test_every_choice_is_compared_at_every_target():
    names = families_for(made(400))
    assert "berxit" not in names  # it wants a signal
    table = compare(made(400), made(300, seed=1), COSTS, [Budget(fraction=0.5), Budget(fraction=0.7)], names)
    assert [row.family for row in table] == [*names, *names]
    for row in table:
        assert row.low <= row.accuracy <= row.high
        assert sum(row.shares) == pytest.approx(1)
        # voting and F-PABEE leave at the second exit at the earliest, which 0.5 does not pay for
        kept = row.achieved <= float(row.target.split()[0]) + 1e-9
        assert kept or (row.status == "infeasible" and row.family in ("voting", "f-pabee"))


def test_the_test_rows_alone_are_judged():
    fit, test = made(400), made(300, seed=1)
    row = compare(fit, test, COSTS, [Budget(fraction=0.5)], ["max-prob"])[0]
    outcome = simulate(calibrate_choice("max-prob", fit, COSTS, Budget(fraction=0.5)).policy, test, COSTS)
    assert (row.cost, row.accuracy) == (outcome.cost, outcome.accuracy)
    assert row.plain == test.accuracy()[-1]


def test_rows_of_another_kind_are_told():
    fit = made(2000)
    found = calibrate_choice("max-prob", fit, COSTS, Budget(fraction=0.5))
    same, other = made(2000, seed=1), made(2000, hard=0.6, seed=2)
    assert drift(found, fit, simulate(found.policy, same, COSTS), COSTS) is None
    told = drift(found, fit, simulate(found.policy, other, COSTS), COSTS)
    assert told is not None
    assert "of another kind" in told
    assert compare(fit, other, COSTS, [Budget(fraction=0.5)], ["max-prob"])[0].warning == told


def test_halves_are_disjoint_and_swapped():
    trace = made(101)
    pools = halves(trace, 3, seed=5)
    assert len(pools) == 6
    for one, other in zip(pools[::2], pools[1::2], strict=True):
        assert torch.equal(torch.cat([one.test_rows, other.test_rows]).sort().values, torch.arange(101))
        assert torch.equal(one.fit.logits, other.test.logits)
    assert not torch.equal(pools[0].test_rows, pools[2].test_rows)


def test_pooled_accuracy_is_the_mean_over_rows_and_repeats_do_not_narrow_its_interval():
    trace = made(200)
    few = compare_pooled(halves(trace, 2), 200, COSTS, Budget(fraction=0.6), ["max-prob"])[0]
    many = compare_pooled(halves(trace, 12), 200, COSTS, Budget(fraction=0.6), ["max-prob"])[0]
    assert many.high - many.low == pytest.approx(few.high - few.low, rel=0.2)
    assert many.plain == pytest.approx(trace.accuracy()[-1])
    by_hand = [
        simulate(calibrate_choice("max-prob", p.fit, COSTS, Budget(fraction=0.6)).policy, p.test, COSTS).accuracy
        for p in halves(trace, 2)
    ]
    assert few.accuracy == pytest.approx(sum(by_hand) / len(by_hand), abs=5e-3)  # halves of nearly one size


def test_mixed_statuses_are_called_mixed():
    trace = made(120)
    tied = ExitTrace(logits=torch.zeros(3, 60, 4), labels=torch.zeros(60, dtype=torch.int64))
    pools = [Pool(trace, trace, torch.arange(120)), Pool(tied, trace, torch.arange(120))]
    assert compare_pooled(pools, 120, COSTS, Budget(fraction=0.5), ["max-prob"])[0].status == "mixed"


def test_mistakes():
    unlabelled = ExitTrace(logits=torch.randn(3, 10, 4))
    with pytest.raises(DataError, match="needs labels"):
        compare(made(50), unlabelled, COSTS, [Budget(fraction=0.5)], ["max-prob"])
    with pytest.raises(ValueRangeError, match="expected one of max-prob"):
        calibrate_choice("bert", made(50), COSTS, Budget(fraction=0.5))
    with pytest.raises(ValueRangeError, match="Give it a Budget"):
        calibrate_choice("patience", made(50), COSTS, ErrorRate())
