"""Calibration: budgets are met from below, promises hold, ties and odd traces do no harm."""

import itertools
import json

import pytest
import torch
from scipy.stats import beta
from torch.nn.functional import one_hot

from offramp.calibrate import Calibration, EENetFit, ErrorRate, beem_weights, calibrate
from offramp.calibrate.error_rate import _bounded
from offramp.cost import Budget, CostModel, TimedCosts
from offramp.errors import DataError, FormatError, ShapeError, ValueRangeError
from offramp.policies import BEEM, EENet, Entropy, Evidence, MaxProb, Patience, visits
from offramp.simulate import simulate, walk
from offramp.trace import ExitTrace

QUICK = EENetFit(steps=20)


def synthetic(exits: int, classes: int, rows: int = 1000, seed: int = 0, scale: float = 1.0) -> ExitTrace:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=g)
    grow = torch.linspace(1, 3, exits)[:, None, None]
    logits = torch.randn(exits, rows, classes, generator=g) + grow * one_hot(labels, classes)
    return ExitTrace(scale * logits, labels=labels)


def even(exits: int) -> CostModel:
    return CostModel.from_costs([(k + 1) / exits for k in range(exits)])


WAYS = {
    "MaxProb": (MaxProb, {}),
    "Entropy": (Entropy, {}),
    "BEEM-A": (BEEM, {}),
    "BEEM-C": (BEEM, {"weights": "cost"}),
    "EENet": (EENet, {"fit": QUICK}),
    "EENet-mlp": (EENet, {"fit": EENetFit(scorer="mlp", steps=20)}),
}


@pytest.mark.parametrize(("exits", "classes"), [(2, 2), (3, 10), (6, 10), (12, 2)])
@pytest.mark.parametrize("way", WAYS)
def test_budgets_are_met_from_below(way, exits, classes):
    family, settings = WAYS[way]
    trace, costs = synthetic(exits, classes, seed=exits), even(exits)
    first = 1 / exits
    for part in (0.1, 0.6) if family is EENet else (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
        budget = first + part * (1 - first)
        made = calibrate(family, trace, costs, Budget(fraction=budget), **settings)
        assert made.status == "met", made.message
        assert 0.98 * budget <= made.achieved <= budget * (1 + 1e-9)
        assert simulate(made.policy, trace, costs).cost == pytest.approx(made.achieved)
        assert made.rows == 1000


def test_threshold_families_keep_their_promise_on_other_rows():
    fit, other = synthetic(6, 10, 3000, seed=1), synthetic(6, 10, 3000, seed=2)
    for family, settings in WAYS.values():
        made = calibrate(family, fit, even(6), Budget(fraction=0.6), **settings)
        outcome = simulate(made.policy, other, even(6))
        assert outcome.cost == pytest.approx(0.6, rel=0.04)
        assert outcome.accuracy > other.accuracy()[1]


def test_patience_takes_the_largest_whole_step_below():
    trace, costs = synthetic(6, 10), even(6)
    steps = [simulate(Patience(p), trace, costs).cost for p in range(6)]
    for budget in (0.17, 0.35, 0.5, 0.6, 0.75, 0.9, 0.99):
        made = calibrate(Patience, trace, costs, Budget(fraction=budget))
        assert made.achieved == pytest.approx(max(s for s in steps if s <= budget))
        assert made.status == ("met" if made.achieved >= 0.98 * budget else "best_effort")
        if made.status == "best_effort":
            assert "whole steps" in made.message


@pytest.mark.parametrize("way", [*WAYS, "Patience"])
def test_infeasible_says_what_is_possible(way):
    family, settings = WAYS.get(way, (Patience, {}))
    made = calibrate(family, synthetic(3, 4), even(3), Budget(fraction=0.2), **settings)
    assert made.status == "infeasible"
    assert "0.3333 of the plain model" in made.message
    assert made.achieved == pytest.approx(1 / 3)
    assert simulate(made.policy, synthetic(3, 4, seed=9), even(3)).shares == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("way", [*WAYS, "Patience"])
def test_a_budget_for_the_whole_model_switches_the_exits_off(way):
    family, settings = WAYS.get(way, (Patience, {}))
    costs = CostModel(stage=(0.5, 0.5), head=(0.2, 0.0))
    for amount in (1.0, 1.5):
        made = calibrate(family, synthetic(2, 3), costs, Budget(fraction=amount), **settings)
        assert made.status == "met"
        assert made.achieved == pytest.approx(1.0)
        assert visits(made.policy, 2) == (1,)
    made = calibrate(family, synthetic(2, 3), costs, Budget(fraction=0.99), **settings)
    assert made.achieved <= 0.99


def test_the_first_exit_exactly():
    for way, (family, settings) in WAYS.items():
        made = calibrate(family, synthetic(3, 4), even(3), Budget(fraction=1 / 3), **settings)
        assert made.status == "met", way
        assert made.achieved == pytest.approx(1 / 3)


@pytest.mark.parametrize("way", [*WAYS, "Patience"])
def test_one_exit_only(way):
    family, settings = WAYS.get(way, (Patience, {}))
    trace = synthetic(1, 3, 20)
    assert calibrate(family, trace, even(1), Budget(fraction=1.0), **settings).status == "met"
    assert calibrate(family, trace, even(1), Budget(fraction=0.5), **settings).status == "infeasible"


@pytest.mark.parametrize("way", [*WAYS, "Patience"])
@pytest.mark.parametrize("rows", [1, 2, 10])
def test_few_rows(way, rows):
    family, settings = WAYS.get(way, (Patience, {}))
    trace = synthetic(3, 4, rows)
    made = calibrate(family, trace, even(3), Budget(fraction=0.7), **settings)
    assert made.status in ("met", "best_effort")
    assert made.achieved <= 0.7 * (1 + 1e-9)
    # every row can leave at exit 1, so at least that is reached by families with one threshold an exit
    if family in (MaxProb, Entropy):
        assert made.achieved >= 0.6


def reachable(score: torch.Tensor, costs: CostModel) -> list[float]:
    """All mean costs that thresholds can give, by trying every combination (small traces)."""
    levels = [[*sorted(set(row.tolist())), 1e9] for row in score]
    found = []
    for thresholds in itertools.product(*levels):
        total = 0.0
        for i in range(score.shape[1]):
            k = next((k for k, t in enumerate(thresholds) if score[k, i] >= t), len(thresholds))
            total += costs.cumulative()[k]
        found.append(total / score.shape[1])
    return found


@pytest.mark.parametrize("family", [MaxProb, Entropy, BEEM])
def test_ties_everywhere(family):
    """Saturated scores tie at 1.0: the best cost below the budget is still found."""
    logits = torch.tensor([9.0, 0.0]).mul(100).expand(4, 30, 2)
    trace, costs = ExitTrace(logits, labels=torch.zeros(30, dtype=torch.int64)), even(4)
    for budget, best in ((0.3, 0.25), (0.5, 0.5), (0.7, 0.5), (0.76, 0.75), (0.95, 0.75)):
        made = calibrate(family, trace, costs, Budget(fraction=budget))
        assert made.achieved == pytest.approx(best)
        assert made.status == ("met" if best >= 0.98 * budget else "best_effort")


@pytest.mark.parametrize("seed", range(6))
def test_partial_ties_are_near_the_best(seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 3, (3, 12, 2), generator=g).float()
    trace, costs = ExitTrace(logits), even(3)
    possible = reachable(walk(MaxProb(0.0), trace).score[:-1], costs)
    for budget in (0.45, 0.6, 0.75, 0.9):
        made = calibrate(MaxProb, trace, costs, Budget(fraction=budget))
        best = max(c for c in possible if c <= budget + 1e-12)
        assert made.achieved <= budget + 1e-9
        assert made.achieved >= min(0.98 * budget, best - 1 / 12)


def test_eenet_splits_rows_that_tie_after_the_clamp():
    """Nearly every row is right, so nearly all scores pass 1; thresholds lie among them all the same."""
    trace = synthetic(4, 10, 1000, scale=3.0)
    trace = ExitTrace(trace.logits, labels=trace.logits[0].argmax(dim=-1))
    made = calibrate(EENet, trace, even(4), Budget(fraction=0.5), fit=EENetFit(steps=60))
    score = walk(made.policy, trace).score
    assert (score[0] > 1).double().mean() > simulate(made.policy, trace, even(4)).shares[0] + 0.02
    assert made.policy.thresholds[0] > 1
    assert made.status == "met"


@pytest.mark.parametrize("way", [*WAYS, "Patience"])
def test_fitted_in_one_dtype_used_in_another(way):
    family, settings = WAYS.get(way, (Patience, {}))
    exact = synthetic(4, 5, 300).logits.double()
    labels = synthetic(4, 5, 300).labels
    wide, narrow = ExitTrace(exact, labels=labels), ExitTrace(exact.float(), labels=labels)
    policies = [calibrate(family, t, even(4), Budget(fraction=0.6), **settings).policy for t in (wide, narrow)]
    assert policies[0] == policies[1]
    for k in visits(policies[0], 4)[:1]:
        for dtype in (torch.float64, torch.float32):
            seen = Evidence(exact[k].to(dtype))
            step = policies[0].step(k, seen, policies[0].init(seen))
            assert torch.equal(step.stop, walk(policies[0], narrow).stop[0])


@pytest.mark.parametrize("way", [*WAYS, "Patience"])
def test_exits_that_may_not_be_used(way):
    """An exit switched off does not fire at score 1.0, and its head costs nothing."""
    family, settings = WAYS.get(way, (Patience, {}))
    trace = synthetic(4, 3, 400, scale=30.0)
    costs = CostModel(stage=(0.25,) * 4, head=(0.1, 0.1, 0.1, 0.0))
    made = calibrate(family, trace, costs, Budget(fraction=0.8), enabled=(False, True, True, False), **settings)
    outcome = simulate(made.policy, trace, costs)
    assert outcome.shares[0] == 0.0
    assert 0 not in visits(made.policy, 4)
    assert made.achieved == pytest.approx(outcome.cost)
    assert made.achieved <= 0.8 * (1 + 1e-9)
    # the cheapest is now .5 + .1, not .25 + .1
    assert calibrate(
        family, trace, costs, Budget(fraction=0.59), enabled=(False, True, True, True), **settings
    ).status == ("infeasible")
    with pytest.raises(ShapeError):
        calibrate(family, trace, costs, Budget(fraction=0.8), enabled=(False, True), **settings)


TIMED = CostModel(
    stage=(0.3, 0.3, 0.4),
    head=(0.05, 0.05, 0.0),
    plain_flops=1e6,
    timed=(
        TimedCosts(1, 0.010, (0.003, 0.003, 0.004), (0.0005, 0.0005, 0.0), 0.0001),
        TimedCosts(8, 0.020, (0.006, 0.006, 0.008), (0.001, 0.001, 0.0), 0.0001),
        TimedCosts(64, 0.080, (0.024, 0.024, 0.032), (0.002, 0.002, 0.0), 0.0002),
    ),
)


@pytest.mark.parametrize(
    "budget", [Budget(fraction=0.7), Budget(flops=7e5), Budget(ms=7.0), Budget(ms=60.0, batch_size=64)]
)
def test_units(budget):
    trace = synthetic(3, 5)
    for way in ("MaxProb", "BEEM-A", "EENet"):
        family, settings = WAYS[way]
        made = calibrate(family, trace, TIMED, budget, **settings)
        assert made.status == "met"
        assert 0.98 * budget.amount <= made.achieved <= budget.amount * (1 + 1e-9)
        shares = simulate(made.policy, trace, TIMED).shares
        assert made.achieved == pytest.approx(TIMED.spent(shares, budget, made.policy.enabled))
    low = calibrate(MaxProb, trace, TIMED, Budget(**{budget.unit: budget.amount / 100}, batch_size=budget.batch_size))
    assert low.status == "infeasible"


def test_unmeasured_units_and_wrong_families_are_named():
    trace = synthetic(3, 5)
    for budget in (Budget(ms=5.0), Budget(flops=5.0)):
        with pytest.raises(ValueRangeError, match="measure"):
            calibrate(MaxProb, trace, even(3), budget)
    with pytest.raises(ValueRangeError, match="cannot be calibrated"):
        calibrate(int, trace, even(3), Budget(fraction=0.5))
    with pytest.raises(ShapeError, match="4 exits"):
        calibrate(MaxProb, trace, even(4), Budget(fraction=0.5))
    for family in (Patience, EENet):
        with pytest.raises(ValueRangeError, match="Budget"):
            calibrate(family, trace, even(3), ErrorRate())
    bare = ExitTrace(trace.logits)
    for family in (BEEM, EENet):
        with pytest.raises(DataError, match="labels"):
            calibrate(family, bare, even(3), Budget(fraction=0.5))
    assert calibrate(MaxProb, bare, even(3), Budget(fraction=0.5)).status == "met"


def test_beem_weights():
    trace = synthetic(3, 5)
    assert beem_weights(trace, "accuracy") == trace.accuracy()
    assert beem_weights(trace, "cost") == (0.1, 0.2, 0.3)
    assert beem_weights(trace, (1, 2, 3)) == (1.0, 2.0, 3.0)


# --- error rates ---


def slow_error_rate(policy, trace: ExitTrace, target: ErrorRate):
    """(thresholds, enabled) per exit by trying every score as a threshold, row by row."""
    wrong = (trace.logits.argmax(-1) != trace.labels).tolist()
    waiting = set(range(trace.rows))
    thresholds, enabled, flags = [], [], [False] * (trace.exits - 1) + [True]
    for k in range(trace.exits - 1):
        flags[k] = True
        probe = type(policy)(**{**vars(policy), "thresholds": 99.0, "enabled": tuple(flags)})
        walked = walk(probe, trace)
        score = walked.score[walked.visited.index(k)].tolist()
        best = None
        for t in sorted({score[i] for i in waiting}):
            taken = [i for i in waiting if score[i] >= t]
            errors = sum(wrong[k][i] for i in taken)
            base = taken if target.rows == "same" else range(trace.rows)
            allowed = sum(wrong[-1][i] for i in base) / len(base)
            rate = errors / len(taken)
            if target.confidence is not None:
                full = errors == len(taken)
                rate = 1.0 if full else beta.ppf(target.confidence, errors + 1, len(taken) - errors)
            if rate <= allowed + 1e-12:
                best = t
                break
        flags[k] = best is not None
        thresholds.append(best or 0.0)
        enabled.append(best is not None)
        if best is not None:
            waiting -= {i for i in waiting if score[i] >= best}
    return thresholds, enabled


WAYS_TO_ERR = [ErrorRate(rows=rows, confidence=sure) for rows in ("all", "same") for sure in (None, 0.9)]


@pytest.mark.parametrize("target", WAYS_TO_ERR, ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_error_rate_against_a_slow_loop(target, seed):
    trace = synthetic(4, 3, 150, seed=seed)
    for family, settings in ((MaxProb, {}), (Entropy, {}), (BEEM, {}), (BEEM, {"reset": "zero", "weights": "cost"})):
        policy = calibrate(family, trace, even(4), target, **settings).policy
        thresholds, enabled = slow_error_rate(policy, trace, target)
        assert list(policy.enabled[:-1]) == enabled
        assert policy.thresholds[:-1] == pytest.approx(thresholds)


@pytest.mark.parametrize("target", [ErrorRate(shared=True), ErrorRate(shared=True, rows="same"),
                                    ErrorRate(shared=True, confidence=0.95)])  # fmt: skip
def test_shared_error_rate(target):
    trace = synthetic(4, 3, 400)
    made = calibrate(MaxProb, trace, even(4), target)
    assert made.status == "met"
    assert len(set(made.policy.thresholds)) == 1
    final = (trace.logits[-1].argmax(-1) != trace.labels).double()

    def holds(policy) -> bool:
        outcome = simulate(policy, trace, even(4))
        gone = outcome.exit < 3
        taken, errors = int(gone.sum()), int((~outcome.right & gone).sum())
        allowed = float((final[gone] if target.rows == "same" else final).mean())
        if target.confidence is None:
            return errors <= allowed * taken + 1e-9
        return errors < taken and beta.ppf(target.confidence, errors + 1, taken - errors) <= allowed + 1e-12

    assert holds(made.policy)
    # no clearly smaller threshold would do
    assert not any(holds(MaxProb(made.policy.thresholds[0] - step)) for step in (0.01, 0.02, 0.05))


def test_clopper_pearson():
    for errors, taken, allowed in itertools.product((0, 1, 5, 20), (20, 50, 400), (0.01, 0.06, 0.2, 0.6, 0.99)):
        for confidence in (0.5, 0.9, 0.95):
            upper = 1.0 if errors == taken else beta.ppf(confidence, errors + 1, taken - errors)
            assert _bounded(errors, taken, allowed, confidence) == (upper <= allowed)
    assert not _bounded(0, 100, 0.0, 0.95)
    assert _bounded(100, 100, 1.0, 0.95)


def test_exits_without_evidence_are_off():
    """Exit 0 is always right, so it takes every row; nothing is known of exit 1, and new rows must not leave there."""
    right, wrong = [5.0, 0.0], [0.0, 5.0]
    trace = ExitTrace(torch.tensor([[right] * 9, [wrong] * 9, [right] * 9]), labels=torch.zeros(9, dtype=torch.int64))
    made = calibrate(MaxProb, trace, even(3), ErrorRate())
    assert made.policy.enabled == (True, False, True)
    assert made.status == "met"
    # an unsure new row goes on to the end
    assert simulate(made.policy, ExitTrace(torch.zeros(3, 1, 2)), even(3)).exit.tolist() == [2]


@pytest.mark.parametrize("shared", [False, True])
def test_no_exit_qualifies(shared):
    right, wrong = [5.0, 0.0], [0.0, 99.0]
    trace = ExitTrace(torch.tensor([[wrong] * 9, [wrong] * 9, [right] * 9]), labels=torch.zeros(9, dtype=torch.int64))
    made = calibrate(MaxProb, trace, even(3), ErrorRate(shared=shared))
    assert made.policy.enabled == (False, False, True)  # by a flag: every score here is 1.0
    assert made.status == "best_effort"
    assert simulate(made.policy, trace, even(3)).exit.tolist() == [2] * 9


def test_error_rate_settings_are_checked():
    for bad in ({"confidence": 0.3}, {"confidence": 1.0}):
        with pytest.raises(ValueRangeError):
            ErrorRate(**bad)


# --- EENet ---


def odd_traces():
    base = synthetic(3, 4, 60)
    yield "all right", ExitTrace(20 * one_hot(base.labels, 4).float().expand(3, -1, -1), labels=base.labels)
    yield "all wrong", ExitTrace(-20 * one_hot(base.labels, 4).float().expand(3, -1, -1), labels=base.labels)
    yield "one class in the labels", ExitTrace(base.logits, labels=torch.zeros(60, dtype=torch.int64))
    yield "ten rows", synthetic(3, 4, 10)
    yield "two rows", synthetic(3, 4, 2)
    yield "all the same", ExitTrace(torch.zeros(3, 50, 4), labels=torch.zeros(50, dtype=torch.int64))
    yield "huge logits", ExitTrace(base.logits * 1e30, labels=base.labels)


@pytest.mark.parametrize("scorer", ["linear", "mlp"])
@pytest.mark.parametrize(("name", "trace"), list(odd_traces()), ids=[name for name, _ in odd_traces()])
def test_eenet_on_odd_traces(name, trace, scorer):
    for fit in (EENetFit(scorer=scorer, steps=15), EENetFit(scorer=scorer, steps=15, lr=1.0, power=2.0)):
        made = calibrate(EENet, trace, even(3), Budget(fraction=0.7), fit=fit)
        outcome = simulate(made.policy, trace, even(3))
        assert torch.isfinite(outcome.score).all()
        assert made.status in ("met", "best_effort")
        assert made.achieved <= 0.7 * (1 + 1e-9)
        assert sum(outcome.shares) == pytest.approx(1.0)


def test_eenet_is_deterministic_by_seed():
    trace = synthetic(3, 4, 200)
    one, two, other = (
        calibrate(EENet, trace, even(3), Budget(fraction=0.6), fit=EENetFit(steps=20, seed=s, scorer="mlp")).policy
        for s in (0, 0, 1)
    )
    assert one == two
    assert one != other


def test_eenet_without_class_scores_and_with_many_classes():
    trace = synthetic(3, 300, 200)
    with pytest.raises(ValueRangeError, match="class_scores=False"):
        calibrate(EENet, trace, even(3), Budget(fraction=0.6), fit=EENetFit(scorer="mlp", steps=5))
    made = calibrate(EENet, trace, even(3), Budget(fraction=0.6), fit=EENetFit(class_scores=False, steps=20))
    assert made.policy.scorers[0][0].shape == (2,)
    assert made.status == "met"


def test_eenet_beats_max_prob_where_confidence_misleads():
    """Rows of class 0 are sure and wrong at exit 0. A learned score finds out; max-prob cannot."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (3000,), generator=g)
    said = torch.where((torch.rand(3000, generator=g) < 0.9) & (labels == 0), 1, labels)
    first = 6.0 * one_hot(said, 4) + torch.randn(3000, 4, generator=g) * 0.5
    first[said != 1] *= 0.5
    last = 6.0 * one_hot(labels, 4) + torch.randn(3000, 4, generator=g)
    trace = ExitTrace(torch.stack([first, last]), labels=labels)
    fit, test = trace.split((0.5, 0.5))
    learned, plain = (
        simulate(calibrate(family, fit, even(2), Budget(fraction=0.75)).policy, test, even(2)).accuracy
        for family in (EENet, MaxProb)
    )
    assert learned > plain + 0.05


# --- files ---


def test_save_and_load(tmp_path):
    trace = synthetic(3, 4, 100)
    for target, (family, settings) in itertools.product(
        (Budget(fraction=0.6), ErrorRate(confidence=0.9)), WAYS.values()
    ):
        if isinstance(target, ErrorRate) and family is EENet:
            continue
        made = calibrate(family, trace, even(3), target, **settings)
        again = Calibration.load(made.save(tmp_path / "c.json"))
        assert again == made


@pytest.mark.parametrize(
    "change",
    [
        {"status": "fine"}, {"target": ["abc"]}, {"target": {"kind": "Budget"}}, {"target": {"kind": "X"}},
        {"target": {"kind": ["Budget"]}}, {"policy": None}, {"extra": 1},
        {"target": {"kind": "Budget", "fraction": -1}},
        {"target": {"kind": "Budget", "fraction": 10**400}},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_calibrations(tmp_path, change):
    path = calibrate(MaxProb, synthetic(3, 4, 50), even(3), Budget(fraction=0.6)).save(tmp_path / "c.json")
    value = json.loads(path.read_text())
    value["fields"].update(change)
    path.write_text(json.dumps(value))
    with pytest.raises(FormatError):
        Calibration.load(path)
