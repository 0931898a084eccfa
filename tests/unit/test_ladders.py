"""What every family can do on one trace: budgets from below, odd traces, fields kept, fits against other libraries."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from offramp.calibrate import Calibrator, EENetFit, ErrorRate, Joint, MaxDrop, Options, Risk, calibrate
from offramp.calibrate.learned import fit_bins, fit_ztw, logistic
from offramp.calibrate.spend import Spend
from offramp.calibrate.thresholds import Fitted, SharedScores, leave
from offramp.compare import CHOICES
from offramp.cost import Budget, CostModel, TimedCosts
from offramp.errors import DataError, ShapeError, ValueRangeError
from offramp.policies import (
    BEEM,
    FPABEE,
    JEIDNN,
    ZTW,
    AccuracyBins,
    Array,
    EENet,
    Fixed,
    Patience,
    Voting,
    visits,
)
from offramp.simulate import simulate, walk
from offramp.trace import ExitTrace

CHEAP = EENetFit(steps=20)
WAYS = {name: (family, {**options, **({"fit": CHEAP} if family is EENet else {})})
        for name, (family, options) in CHOICES.items() if name != "stopping"}  # its fit is long  # fmt: skip
#: Families with a real number at every exit or one for all, which use any budget up on rows without ties.
SMOOTH = tuple(way for way in WAYS if way not in ("patience", "f-pabee", "voting", "accuracy-bins", "fixed"))


def signed(logits: torch.Tensor, labels: torch.Tensor | None) -> ExitTrace:
    """A trace with the signal that BERxiT needs."""
    certainty = torch.sigmoid(logits.amax(dim=-1, keepdim=True) - 2)
    return ExitTrace(logits, labels=labels, signals=certainty, signal_names=("certainty",))


def synthetic(exits: int, classes: int, rows: int = 600, seed: int = 0, scale: float = 1.0) -> ExitTrace:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=g)
    grow = torch.linspace(1, 3, exits)[:, None, None]
    return signed(scale * (torch.randn(exits, rows, classes, generator=g) + grow * F.one_hot(labels, classes)), labels)


def even(exits: int) -> CostModel:
    return CostModel.from_costs([(k + 1) / exits for k in range(exits)])


HEADED = CostModel(stage=(0.25,) * 4, head=(0.05, 0.05, 0.05, 0.0))


def budgets_hold(way: str, trace: ExitTrace, costs: CostModel, budgets: tuple[float, ...]) -> list[str]:
    """The statuses, each budget's promise having been checked."""
    family, options = WAYS[way]
    found = []
    for budget in budgets:
        made = calibrate(family, trace, costs, Budget(fraction=budget), **options)
        outcome = simulate(made.policy, trace, costs)
        assert outcome.cost == pytest.approx(made.achieved)
        assert torch.isfinite(outcome.score).all()
        if made.status == "infeasible":
            assert made.achieved > budget
        else:
            assert made.achieved <= budget * (1 + 1e-9)
        assert (made.status == "met") == (0.98 * budget <= made.achieved * (1 + 1e-9) <= budget * (1 + 1e-8))
        found.append(made.status)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_budgets_are_met_from_below(way):
    trace = synthetic(4, 5)
    for costs in (even(4), HEADED):
        # the voting of one exit is none, so its cheapest is the second
        found = budgets_hold(way, trace, costs, (0.31, 0.45, 0.61, 0.8, 0.97))
        assert (found[0] == "infeasible") == (way == "voting")
        assert "infeasible" not in found[2:]
        if way in SMOOTH:
            assert set(found) == {"met"}


@pytest.mark.parametrize("way", WAYS)
def test_a_dearer_budget_never_buys_a_cheaper_policy(way):
    family, options = WAYS[way]
    calibrator = Calibrator(family, synthetic(4, 5), even(4), Options(**options))
    grid = (0.3, 0.5, 0.75, 0.95) if way == "eenet" else (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
    spent = [calibrator.to_budget(Budget(fraction=b)).achieved for b in grid]
    assert spent == sorted(spent)


@pytest.mark.parametrize("way", WAYS)
def test_one_exit(way):
    family, options = WAYS[way]
    trace = synthetic(1, 3, 20)
    made = calibrate(family, trace, even(1), Budget(fraction=1.0), **options)
    assert (made.status, made.achieved) == ("met", 1.0)
    made = calibrate(family, trace, even(1), Budget(fraction=0.5), **options)
    assert (made.status, made.achieved) == ("infeasible", 1.0)
    assert simulate(made.policy, trace, even(1)).shares == (1.0,)


@pytest.mark.parametrize("way", WAYS)
def test_two_exits(way):
    family, options = WAYS[way]
    made = calibrate(family, synthetic(2, 3), even(2), Budget(fraction=0.75), **options)
    if way == "voting":  # there is only the last exit where two could have agreed
        assert (made.status, made.achieved) == ("infeasible", 1.0)
    else:
        assert made.status == "met" or way not in SMOOTH
        assert 0.5 <= made.achieved <= 0.75


@pytest.mark.parametrize("way", WAYS)
def test_ties_everywhere(way):
    """All logits are equal: every row must leave together, at some exit within the budget."""
    trace = signed(torch.zeros(4, 40, 3), torch.arange(40) % 3)
    budgets_hold(way, trace, even(4), (0.3, 0.5, 0.6, 0.8, 0.95))
    family, options = WAYS[way]
    made = calibrate(family, trace, even(4), Budget(fraction=0.5), **options)
    assert (made.status, simulate(made.policy, trace, even(4)).shares) == ("met", (0.0, 1.0, 0.0, 0.0))


@pytest.mark.parametrize("way", WAYS)
def test_a_class_never_seen(way):
    trace = synthetic(4, 4, 200)
    budgets_hold(way, signed(trace.logits, trace.labels.clamp(max=1)), even(4), (0.4, 0.7))


@pytest.mark.parametrize("way", WAYS)
def test_ten_rows(way):
    budgets_hold(way, synthetic(4, 3, 10), HEADED, (0.4, 0.6, 0.8, 0.95))


@pytest.mark.parametrize("way", WAYS)
def test_large_logits_saturate_but_do_no_harm(way):
    budgets_hold(way, synthetic(4, 3, 150, scale=1000.0), even(4), (0.4, 0.8))


def test_nan_is_refused_before_any_family_sees_it():
    logits = torch.zeros(3, 5, 2)
    for bad in (float("nan"), float("inf")):
        logits[1, 2, 0] = bad
        with pytest.raises(ValueRangeError, match="logits"):
            ExitTrace(logits)


NEED = {
    "f-pabee": "FPABEE", "pcee": "PCEE", "beem-a": "accuracy", "eenet": "EENet", "ztw": "ZTW", "jei-dnn": "JEI-DNN",
    "accuracy-bins": "AccuracyBins", "eero": "accuracy",
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_labels_are_asked_for_only_where_they_are_needed(way):
    family, options = WAYS[way]
    bare = signed(synthetic(3, 4).logits, None)
    if way in NEED:
        with pytest.raises(DataError, match=f"{NEED[way]}.* needs labels"):
            calibrate(family, bare, even(3), Budget(fraction=0.7), **options)
    else:
        made = calibrate(family, bare, even(3), Budget(fraction=0.7), **options)
        assert made.policy == calibrate(family, synthetic(3, 4), even(3), Budget(fraction=0.7), **options).policy


TIMED = CostModel(
    stage=(0.3, 0.3, 0.4),
    head=(0.05, 0.05, 0.0),
    plain_flops=1e6,
    timed=(
        TimedCosts(1, 0.010, (0.003, 0.003, 0.004), (0.0005, 0.0005, 0.0), 0.0001),
        TimedCosts(64, 0.080, (0.024, 0.024, 0.032), (0.002, 0.002, 0.0), 0.0002),
    ),
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("budget", [Budget(flops=7.5e5), Budget(ms=7.5), Budget(ms=60.0, batch_size=64)], ids=str)
def test_other_units(way, budget):
    family, options = WAYS[way]
    trace = synthetic(3, 5, 300)
    made = calibrate(family, trace, TIMED, budget, **options)
    outcome = simulate(made.policy, trace, TIMED)
    assert made.achieved == pytest.approx(TIMED.spent(outcome.shares, budget, made.policy.enabled))
    assert made.achieved <= budget.amount * (1 + 1e-9)
    assert made.status == ("met" if way in SMOOTH or made.achieved >= 0.98 * budget.amount else "best_effort")


# --- a policy value as the family ---

TRACE = synthetic(4, 3, 300)
BINS = AccuracyBins(((0.5, 0.7),) * 4, ((0.2, 0.6, 0.9),) * 4, 0.5)
GATES = JEIDNN(Array(torch.randn(4, 5, generator=torch.Generator().manual_seed(0))), power=2.0)
ENSEMBLE = ZTW(0.5, Array(torch.full((4, 4), -0.5)), Array(torch.zeros(4, 3)))
VALUES = [
    Voting(0.3, power=0.5),
    BEEM((0.9, 0.2, 0.7, 0.1), 0.0, reset="zero"),
    BEEM((0.5,) * 4, 0.0, task="multilabel"),
    BINS,
    GATES,
    ENSEMBLE,
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_keeps_its_fields_and_needs_no_labels(value):
    bare = ExitTrace(TRACE.logits)
    for budget in (0.55, 0.8):
        made = calibrate(value, bare, even(4), Budget(fraction=budget))
        assert made.achieved <= budget * (1 + 1e-9)
        assert replace(made.policy, thresholds=value.thresholds) == value
    assert visits(calibrate(value, bare, even(4), Budget(fraction=1.0)).policy, 4) == (3,)


@pytest.mark.parametrize("measure", ["js", "kl", "kl-reverse", "symmetric"])
def test_fpabee_keeps_its_measure(measure):
    made = calibrate(FPABEE(1.0, measure=measure), TRACE, even(4), Budget(fraction=0.7))
    assert replace(made.policy, tau=1.0, patience=1) == FPABEE(1.0, measure=measure)
    assert made.status == "met"
    many = calibrate(FPABEE(1.0, task="multilabel"), TRACE, even(4), Budget(fraction=0.7))
    assert (many.status, many.policy.task) == ("met", "multilabel")


def test_patience_for_one_number():
    g = torch.Generator().manual_seed(0)
    steps = torch.tensor([4.0, 3.0, 2.0, 1.0, 1.0])[:, None, None]
    trace = ExitTrace(torch.randn(5, 400, 1, generator=g).cumsum(dim=0) * steps)
    value = Patience(3, task="regression", tolerance=0.8)
    costs = [simulate(replace(value, patience=p), trace, even(5)).cost for p in range(5)]
    for budget in (0.3, 0.5, 0.7, 0.9):
        made = calibrate(value, trace, even(5), Budget(fraction=budget))
        assert replace(made.policy, patience=3) == value
        assert made.achieved == pytest.approx(max(c for c in costs if c <= budget))
    beem = BEEM((1.0,) * 5, 0.0, reset="zero", task="regression", tolerance=0.8)
    made = calibrate(beem, trace, even(5), Budget(fraction=0.8))
    assert replace(made.policy, thresholds=0.0) == beem
    assert made.achieved <= 0.8


def test_values_that_cannot_be_families():
    fitted = calibrate(EENet, TRACE, even(4), Budget(fraction=0.7), fit=CHEAP).policy
    with pytest.raises(ValueRangeError, match="fitted for a budget"):
        calibrate(fitted, TRACE, even(4), Budget(fraction=0.5))
    with pytest.raises(ShapeError):
        calibrate(BEEM((1.0, 1.0), 0.0), TRACE, even(4), Budget(fraction=0.5))


def test_exits_that_are_off_stay_off():
    flags = (False, True, True, True)
    for way, (family, options) in WAYS.items():
        made = calibrate(family, TRACE, HEADED, Budget(fraction=0.9), enabled=flags, **options)
        assert 0 not in visits(made.policy, 4), way
        assert made.achieved <= 0.9 * (1 + 1e-9), way


# --- fits ---


def cross_entropies(policy: ZTW, trace: ExitTrace) -> list[float]:
    return [float(F.cross_entropy(answer, trace.labels)) for answer in walk(policy, trace).answer]


@pytest.mark.parametrize("cascade", [True, False])
@pytest.mark.parametrize("flags", [(True,) * 4, (False, True, False, True)])
def test_ztw_lowers_cross_entropy_at_every_exit(cascade, flags):
    trace = synthetic(4, 5, 500, seed=3)
    fitted = fit_ztw(trace, flags, cascade=cascade)
    zeros = ZTW(fitted.thresholds, Array(torch.zeros(4, 4)), Array(torch.zeros(4, 5)), None, fitted.enabled)
    before, after = cross_entropies(zeros, trace), cross_entropies(fitted, trace)
    assert all(b < a - 1e-3 for a, b in zip(before[1:], after[1:], strict=True))
    assert after[0] <= before[0] + 1e-6
    assert (fitted.cascade is None) == (not cascade)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1000.0])
def test_ztw_is_finite_at_any_scale(scale):
    trace = synthetic(3, 4, 200, scale=scale)
    fitted = fit_ztw(trace, (True,) * 3)
    zeros = ZTW(0.5, Array(torch.zeros(3, 3)), Array(torch.zeros(3, 4)))
    for before, after in zip(cross_entropies(zeros, trace), cross_entropies(fitted, trace), strict=True):
        assert after <= before * (1 + 1e-6)
    assert torch.isfinite(walk(fitted, trace).score).all()


@pytest.mark.parametrize("rows", [10, 60, 700])
def test_bins_are_sklearns_isotonic_regression_of_their_means(rows):
    trace = synthetic(3, 4, rows, seed=rows)
    loose = fit_bins(trace, (True,) * 3, isotonic=False)
    tight = fit_bins(trace, (True,) * 3)
    assert loose.edges == tight.edges
    for k in range(3):
        confidence = torch.softmax(trace.logits[k], dim=-1).amax(dim=-1)
        place = np.searchsorted(np.array(loose.edges[k], dtype=np.float32), confidence.numpy(), side="right")
        right = (trace.logits[k].argmax(dim=-1) == trace.labels).numpy()
        means = [right[place == b].mean() for b in range(len(loose.edges[k]) + 1)]
        assert loose.accuracies[k] == pytest.approx(means)
        assert rows < 25 or np.bincount(place).min() >= 25 - 1
        expected = IsotonicRegression().fit_transform(np.arange(len(means)), means, sample_weight=np.bincount(place))
        assert tight.accuracies[k] == pytest.approx(expected)


@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_logistic_is_sklearns(ridge):
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(300, 3, generator=g), torch.ones(300, 1)], dim=1)
    y = (x @ torch.tensor([1.0, -2.0, 0.0, 0.5]) + torch.randn(300, generator=g) > 0).float()
    theirs = LogisticRegression(C=1 / (ridge * 300), fit_intercept=False, tol=1e-10, max_iter=1000)
    theirs.fit(x.double().numpy(), y.numpy())
    assert logistic(x, y, ridge).tolist() == pytest.approx(theirs.coef_[0].tolist(), abs=1e-4)


def test_logistic_has_an_answer_for_separable_and_one_sided_data():
    x = torch.cat([torch.linspace(-1, 1, 50)[:, None], torch.ones(50, 1)], dim=1)
    found = logistic(x, (x[:, 0] > 0).float())
    assert torch.isfinite(found).all()
    assert found[0] > 5
    assert logistic(x, torch.ones(50))[1] > 3


# --- one calibrator, many targets ---


@pytest.mark.parametrize("way", ["max-prob", "patience", "jei-dnn"])
def test_one_calibrator_gives_what_calibrate_gives(way):
    family, options = WAYS[way]
    fit, one, other = synthetic(3, 4, 200), synthetic(3, 4, 300, seed=1), synthetic(3, 4, 400, seed=2)
    calibrator = Calibrator(family, fit, TIMED, Options(**options))
    asked = [(Budget(fraction=0.8), None), (Budget(ms=8.0), None), (MaxDrop(0.02), None), (Risk(0.1), one)]
    asked += [(Risk(0.2), other), (Joint(Risk(0.2), Budget(fraction=0.8), "safest"), one), (Budget(fraction=0.8), None)]
    asked += [(ErrorRate(), None)] if way == "max-prob" else []
    for target, certify in asked:
        found = calibrate(family, fit, TIMED, target, certify=certify, **options)
        # with a budget of time, calibrate switches exits off that do not pay, and so needs another calibrator
        if "switched off" not in found.message:
            assert calibrator.to(target, certify) == found


# --- thresholds raised exit by exit, against a slow search ---


def slow_raise(scores: torch.Tensor, start: Fitted, spend: Spend, order: range) -> float:
    """The cost when each exit's threshold in turn is the best of all that could matter."""
    best, thresholds = start.cost, list(start.thresholds)
    for k in order:
        for t in [*sorted(set(scores[k].tolist())), 99.0]:
            tried = [*thresholds[:k], t, *thresholds[k + 1 :]]
            cost = spend.mean(leave(scores, tried))
            if best < cost <= spend.limit:
                best, thresholds = cost, tried
    return best


@pytest.mark.parametrize("seed", range(8))
def test_raised_thresholds_cost_as_much_as_a_slow_greedy_search(seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (3, 15), generator=g).float()
    costs = HEADED if seed % 2 else even(4)
    shared = SharedScores(scores)
    for budget in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97):
        spend = Spend(costs, Budget(fraction=budget), (True,) * 4)
        first = shared.fit(spend, apart=False)
        if first is None:
            assert spend.mean(leave(scores, (-1.0,) * 3)) > spend.limit
            continue
        assert first.cost == pytest.approx(spend.mean(leave(scores, first.thresholds)))
        for order in (range(3), range(2, -1, -1)):
            found = shared._raise(first, spend, order)
            assert found.cost == pytest.approx(slow_raise(scores, first, spend, order))
            assert found.shares == pytest.approx(leave(scores, found.thresholds))
            assert found.cost <= spend.limit


@pytest.mark.parametrize("seed", range(4))
def test_one_threshold_is_the_best_of_all(seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 40, generator=g)
    shared = SharedScores(scores)
    tried = sorted(scores.flatten().tolist())
    for budget in (0.3, 0.5, 0.7, 0.9):
        spend = Spend(even(4), Budget(fraction=budget), (True,) * 4)
        possible = [spend.mean(leave(scores, (t,) * 3)) for t in tried]
        assert shared.fit(spend, apart=False).cost == pytest.approx(max(c for c in possible if c <= spend.limit))


def test_fixed_takes_the_dearest_exit_within_the_budget():
    for budget, exit_ in ((0.3, 0), (0.55, 1), (0.99, 2), (1.0, 3)):
        assert calibrate(Fixed, TRACE, even(4), Budget(fraction=budget)).policy == Fixed(exit_, 4)
