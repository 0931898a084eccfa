import dataclasses
import json

import numpy as np
import pytest
import torch

import offramp
from offramp import BEEM, Budget, CostModel, EENet, Entropy, ExitTrace, Fixed, MaxProb, Patience, calibrate
from offramp.check import Reference, check, ks_p, recalibrate_quantiles, reference
from offramp.check.twosample import band_distance, holm, shares_test
from offramp.check.verdict import compared
from offramp.errors import FormatError, ShapeError, ValueRangeError
from offramp.simulate import simulate, walk

COSTS = CostModel.from_costs((0.3, 0.65, 1.0))
HALF = Budget(fraction=0.6)


def trace(rows: int, seed: int, strength: float = 1.0, exits: int = 3, classes: int = 3) -> ExitTrace:
    """Seeded rows whose exits grow surer with depth; a smaller strength makes all of them unsure."""
    made = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=made)
    hard = torch.rand(rows, generator=made)
    logits = torch.randn(exits, rows, classes, generator=made)
    sure = strength * 3 * (1 - hard) * torch.arange(1, exits + 1)[:, None]
    return ExitTrace(logits + sure[..., None] * torch.nn.functional.one_hot(labels, classes), labels=labels)


@pytest.fixture(scope="module")
def fit() -> ExitTrace:
    return trace(600, 0)


@pytest.fixture(scope="module")
def policy(fit: ExitTrace) -> MaxProb:
    return calibrate(MaxProb, fit, COSTS, HALF).policy


@pytest.mark.parametrize(("rows", "others"), [(5, 7), (40, 60), (300, 50), (200, 200), (1, 9), (3000, 700)])
def test_ks_is_that_of_scipy(rows: int, others: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    dice = np.random.default_rng(rows)
    for shift in (0.0, 0.2, 0.7):
        first = dice.normal(size=rows).astype(np.float32)
        other = (dice.normal(size=others) + shift).astype(np.float32)
        apart = band_distance(np.sort(first), np.arange(1, rows + 1), rows, other)
        expected = stats.ks_2samp(first, other, method="exact")
        assert apart / (rows * others) == pytest.approx(expected.statistic, abs=1e-12)
        assert ks_p(apart, rows, others) == pytest.approx(expected.pvalue, rel=1e-6)


def test_ks_of_many_rows_is_bounded_by_its_limit() -> None:
    stats = pytest.importorskip("scipy.stats")
    rows = others = 50_000
    for distance in (0.006, 0.009, 0.012):
        apart = round(distance * rows * others)
        limit = stats.kstwobign.sf(distance * (rows * others / (rows + others)) ** 0.5)
        assert limit <= ks_p(apart, rows, others) <= 1.15 * limit + 0.2 * (limit > 0.2)
    assert ks_p(round(0.05 * 9_000 * 10_000), 9_000, 10_000) == pytest.approx(
        stats.kstwobign.sf(0.05 * (9e7 / 19_000) ** 0.5), rel=0.1
    )


def test_the_distance_to_a_band_is_never_above_the_distance_and_near_it() -> None:
    dice = np.random.default_rng(0)
    for ties in (False, True):
        first, other = dice.normal(size=3000), dice.normal(size=500) + 0.2
        first, other = ((a.round(1) if ties else a).astype(np.float32) for a in (first, other))
        whole = band_distance(np.sort(first), np.arange(1, 3001), 3000, other) / (3000 * 500)
        ranks = np.unique(np.linspace(1, 3000, 129).round().astype(int))
        some = band_distance(np.sort(first)[ranks - 1], ranks, 3000, other) / (3000 * 500)
        assert whole - 1 / 128 - 1e-9 <= some <= whole


def test_the_test_of_shares_is_that_of_all_permutations() -> None:
    stats = pytest.importorskip("scipy.stats")
    g, p = shares_test((30, 50, 20), (20, 60, 40), 20_000, 0)
    expected = stats.chi2_contingency([[30, 50, 20], [20, 60, 40]], lambda_="log-likelihood")
    assert g == pytest.approx(expected.statistic)
    assert p == pytest.approx(expected.pvalue, abs=0.01)
    assert shares_test((10, 0), (5, 0), 999, 0) == (0.0, 1.0)
    _, p = shares_test((3, 0), (0, 3), 20_000, 0)
    assert p == pytest.approx(stats.fisher_exact([[3, 0], [0, 3]]).pvalue, abs=0.01)


def test_holm() -> None:
    found = holm([("a", 1.0, 0.02), ("b", 1.0, 0.001), ("c", 1.0, 0.03)], 0.05)
    assert [t.rejected for t in found] == [True, True, True]
    assert [t.rejected for t in holm([("a", 1.0, 0.03), ("b", 1.0, 0.04)], 0.05)] == [False, False]


def alarms(draws: int, policy_of, level: float = 0.1) -> int:
    """How often new rows of the same kind are called shifted, each time against reference rows of their own."""
    found = 0
    for i in range(draws):
        fit, new = trace(150, 2 * i), trace(100, 2 * i + 1)
        policy = policy_of(fit)
        tests = compared(policy, reference(policy, fit), new, walk(policy, new), level)
        found += any(test.rejected for test in tests)
    return found


def test_false_alarms_keep_the_level() -> None:
    """Thresholds are those that the reference rows' own quantiles give, as a calibration's are."""

    def fitted(fit: ExitTrace) -> MaxProb:
        return MaxProb(tuple(torch.quantile(torch.softmax(z, -1).amax(-1), 0.6).item() for z in fit.logits))

    assert alarms(400, fitted) / 400 <= 0.1 + 3 * (0.1 * 0.9 / 400) ** 0.5


@pytest.mark.parametrize("family", [BEEM, EENet])
def test_false_alarms_keep_the_level_where_scores_are_fitted_to_the_reference_rows(family: type) -> None:
    options = {"fit": offramp.EENetFit(steps=10)} if family is EENet else {}
    draws = 12 if family is EENet else 80
    found = alarms(draws, lambda fit: calibrate(family, fit, COSTS, HALF, **options).policy)
    assert found / draws <= 0.1 + 3 * (0.1 * 0.9 / draws) ** 0.5


def test_scores_that_were_learned_from_the_reference_rows_are_not_tested(fit: ExitTrace) -> None:
    learned = calibrate(EENet, fit, COSTS, HALF, fit=offramp.EENetFit(steps=5)).policy
    assert [t.name for t in check(learned, fit, fit, COSTS).tests] == [f"max-prob at exit {k}" for k in range(3)]


@pytest.mark.parametrize("family", [MaxProb, Entropy, BEEM])
def test_shifted_rows_are_found_and_the_cost_is_restored(fit: ExitTrace, family: type) -> None:
    policy = calibrate(family, fit, COSTS, HALF).policy
    new = ExitTrace(trace(500, 1, strength=0.5).logits)  # no labels
    before = reference(policy, fit)
    found = check(policy, before, new, COSTS, budget=HALF)
    assert found.verdict == "shifted"
    assert "5 %" in found.sentence
    assert "exceeded" in found.sentence
    assert found.cost_holds is False
    assert found.cost_after > found.cost_low > HALF.amount >= found.cost_before
    assert found.shares_before == pytest.approx(simulate(policy, fit, COSTS).shares)
    assert found.shares_after == pytest.approx(simulate(policy, new, COSTS).shares)
    for budget in (None, HALF):
        moved = recalibrate_quantiles(policy, before, new, COSTS, budget)
        after = simulate(moved, new, COSTS)
        assert type(moved) is family
        assert moved.enabled == policy.enabled
        if budget is None:
            assert after.shares == pytest.approx(found.shares_before, abs=0.01)
        else:
            assert 0.98 * HALF.amount <= after.cost <= HALF.amount * (1 + 1e-9)
            assert check(moved, new, new, COSTS, budget=HALF).cost_holds


def test_unshifted_rows_are_the_same_and_the_sentence_says_what_may_go_unseen(fit: ExitTrace, policy: MaxProb) -> None:
    found = check(policy, reference(policy, fit), trace(500, 7), COSTS, level=0.01, budget=HALF)
    assert found.verdict == "same"
    assert "1 %" in found.sentence
    assert "may go unseen" in found.sentence
    assert 0.05 < found.visible < 1 / 3
    assert found.cost_low < found.cost_after < found.cost_high
    assert found.cost_holds
    assert [t.name for t in found.tests] == ["exit shares", *(f"max-prob at exit {k}" for k in range(3))]
    assert check(policy, fit, trace(500, 7), COSTS) == check(policy, fit, trace(500, 7), COSTS)


def test_one_row_is_too_few(fit: ExitTrace, policy: MaxProb) -> None:
    found = check(policy, reference(policy, fit), trace(1, 3), COSTS, budget=HALF)
    assert found.verdict == "too few rows"
    assert found.cost_low < 0.35
    assert found.cost_high > 0.95
    assert found.cost_holds
    assert "Give more rows" in found.sentence


def test_the_interval_of_the_cost_is_right_as_often_as_it_says() -> None:
    policy = MaxProb((0.8, 0.9, 0.0))
    truth = simulate(policy, trace(100_000, 1), COSTS).cost
    right = 0
    for i in range(100):
        found = check(policy, trace(5, 0), trace(60, 100 + i), COSTS, level=0.2)
        right += found.cost_low <= truth <= found.cost_high
    assert right / 100 >= 0.8 - 3 * (0.2 * 0.8 / 100) ** 0.5


def test_costs_in_milliseconds_and_flops(fit: ExitTrace, policy: MaxProb) -> None:
    times = offramp.cost.TimedCosts(4, 4e-3, (1e-3, 1e-3, 2e-3), (1e-4, 1e-4, 0.0))
    costs = dataclasses.replace(COSTS, plain_flops=1e6, timed=(times,))
    new = trace(400, 2)
    for budget in (Budget(ms=9.0, batch_size=4), Budget(flops=6e5)):
        found = check(policy, fit, new, costs, budget=budget)
        assert found.cost_after == pytest.approx(costs.spent(simulate(policy, new, costs).shares, budget))
        assert found.cost_low < found.cost_after < found.cost_high
        assert found.unit == budget.unit
    with pytest.raises(ValueRangeError, match="no measured times"):
        check(policy, fit, new, COSTS, budget=Budget(ms=9.0))


def test_exits_that_are_off_and_plain_have_no_tests(fit: ExitTrace) -> None:
    off = MaxProb((0.5, 0.8, 0.0), enabled=(False, True, True))
    names = [t.name for t in check(off, reference(off, fit), trace(300, 4), COSTS).tests]
    assert names == ["exit shares", "max-prob at exit 1", "max-prob at exit 2"]
    plain = MaxProb((1.0,) * 3, enabled=(False, False, True))
    assert [t.name for t in check(plain, fit, trace(300, 4), COSTS).tests] == ["max-prob at exit 2"]
    assert recalibrate_quantiles(plain, fit, fit, COSTS) == plain
    patient = [t.name for t in check(Patience(1), fit, trace(300, 4), COSTS).tests]
    assert "score at exit 1" in patient
    assert "max-prob at exit 1" in patient


def test_a_reference_is_json_and_small(fit: ExitTrace) -> None:
    policy = BEEM(weights=(0.1, 0.2, 0.3), thresholds=(0.2, 0.3, 0.0))
    found = reference(policy, trace(5000, 3))
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert len(text) < 6000
    assert Reference.from_dict(json.loads(text)) == found
    assert hash(found) == hash(Reference.from_dict(json.loads(text)))
    assert found.rows == 5000
    assert len(found.ranks) == 129
    assert found.ranks[[0, -1]].tolist() == [1, 5000]
    for rows in (*range(1, 9), *range(120, 140), 257, 258, 259, 400):  # ranks are found again from the number of points
        assert len(reference(MaxProb(0.5), trace(rows, 0)).ranks) == min(rows, 129)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(kind="offramp.trace"),
        lambda v: v.update(version=2),
        lambda v: v.update(extra=1),
        lambda v: v["fields"].update(extra=1),
        lambda v: v["fields"].pop("policy"),
        lambda v: v["fields"].update(left=[0, 0, 0]),
        lambda v: v["fields"].update(left=[1.5, 2, 3]),
        lambda v: v["fields"].update(left=[1, 1, 1]),
        lambda v: v["fields"]["samples"][0].update(points="AAA"),
        lambda v: v["fields"]["samples"][0].update(points="AADAfwAAwH8="),
        lambda v: v["fields"]["samples"][0].update(exit=9),
        lambda v: v["fields"].update(samples=7),
    ],
)
def test_a_damaged_reference_is_told(fit: ExitTrace, policy: MaxProb, change) -> None:
    value = json.loads(json.dumps(reference(policy, fit).to_dict()))
    change(value)
    with pytest.raises(FormatError, match="reference"):
        Reference.from_dict(value)


def test_what_does_not_fit_is_told(fit: ExitTrace, policy: MaxProb) -> None:
    before = reference(policy, fit)
    with pytest.raises(ShapeError, match="4 entries|3 entries"):
        check(policy, before, trace(50, 0, exits=4), COSTS)
    shared = MaxProb(0.8)
    with pytest.raises(ShapeError, match="Record and measure the same model"):
        check(shared, fit, trace(50, 0, exits=4), COSTS)
    with pytest.raises(ShapeError, match="5\\b.*classes|and 5"):
        check(policy, before, trace(50, 0, classes=5), COSTS)
    with pytest.raises(ValueRangeError, match="another policy"):
        check(shared, before, fit, COSTS)
    for level in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueRangeError, match="level is"):
            check(policy, before, fit, COSTS, level=level)
    with pytest.raises(ValueRangeError, match="NaN"):
        check(policy, before, ExitTrace(torch.full((3, 4, 3), float("nan"))), COSTS)


@pytest.mark.parametrize("policy", [Patience(1), Fixed(1, 3)])
def test_a_policy_without_thresholds_cannot_be_moved(fit: ExitTrace, policy) -> None:
    with pytest.raises(ValueRangeError, match=f"{type(policy).__name__} has no threshold per exit to move"):
        recalibrate_quantiles(policy, fit, fit, COSTS)


def test_a_budget_below_every_share_is_told(fit: ExitTrace, policy: MaxProb) -> None:
    with pytest.raises(ValueRangeError, match="no shares of the exits"):
        recalibrate_quantiles(policy, fit, fit, COSTS, Budget(fraction=0.1))


def test_a_bundle_keeps_the_reference(tmp_path) -> None:
    from bundles import bundle

    made = bundle()
    name, choice = next(iter(made.policies.items()))
    rows = offramp.record(made.model, (torch.randn(90, 6), torch.randint(3, (90,))), progress=False)
    known = dataclasses.replace(choice, reference=reference(choice.policy, rows))
    path = made.with_policies({name: known, "other": choice}).save(tmp_path / "b.offramp")
    again = offramp.Bundle.load(path)
    assert again.policies[name].reference == known.reference
    assert again.policies["other"].reference is None
