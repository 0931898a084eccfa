"""Risks as targets: what is certified, what the sentence says, and that promises hold on new rows."""

import itertools
import json
import math

import pytest
import torch
from torch.nn.functional import one_hot

from offramp.calibrate import Calibration, Calibrator, EENetFit, Joint, Options, Promise, Risk, calibrate
from offramp.calibrate.risk import certified, losses_of, needed_rows, promise_of
from offramp.compare import CHOICES
from offramp.cost import Budget, CostModel
from offramp.errors import DataError, FormatError, ShapeError, ValueRangeError
from offramp.policies import EENet, MaxProb, Patience, visits
from offramp.simulate import simulate
from offramp.sweep import Said, Sweep
from offramp.trace import ExitTrace


def synthetic(exits: int, classes: int, rows: int = 1000, seed: int = 0, scale: float = 1.0) -> ExitTrace:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=g)
    grow = torch.linspace(1, 3, exits)[:, None, None]
    logits = torch.randn(exits, rows, classes, generator=g) + grow * one_hot(labels, classes)
    return ExitTrace(scale * logits, labels=labels, ids=tuple(str(i) for i in range(rows)))


def even(exits: int) -> CostModel:
    return CostModel.from_costs([(k + 1) / exits for k in range(exits)])


def counts(losses: list[int], rows: int) -> torch.Tensor:
    """One policy per count, the lost rows spread out."""
    return torch.stack([(torch.arange(rows) * 7919 % rows < c).float() for c in losses])


# --- what may be asked ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": -0.01}, "epsilon is -0.01; expected a number from 0 and below 1"),
        ({"epsilon": 1.0}, "epsilon is 1.0"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"epsilon": 0.1, "delta": 0.0}, "delta is 0.0; expected a number above 0 and below 1"),
        ({"epsilon": 0.1, "delta": 1.0}, "delta is 1.0"),
        ({"epsilon": 0.1, "loss": "signed drop", "method": "ltt"}, "not valid for a signed drop; use 'betting'"),
        ({"epsilon": 0.1, "loss": "signed drop", "method": "crc"}, "'crc' is not valid for a signed drop"),
    ],
    ids=str,
)  # fmt: skip
def test_risks_are_checked(settings, message):
    with pytest.raises(ValueRangeError, match=message):
        Risk(**settings)


def test_joints_are_checked():
    for method in ("crc", "plain"):
        with pytest.raises(ValueRangeError, match=f"'{method}' has no bound for one policy; use 'ltt' or 'betting'"):
            Joint(Risk(0.1, method=method), Budget(fraction=0.5), "safest")
        assert Joint(Risk(0.1, method=method), Budget(fraction=0.5)).prefer == "cheapest"


@pytest.mark.parametrize(
    "change", [{"loss": "damage"}, {"method": "luck"}, {"epsilon": -1.0}, {"delta": 0.0}, {"sure": 1}], ids=str
)
def test_risks_that_a_file_may_not_hold(tmp_path, change):
    risk = Risk(0.2)
    promise = Promise("drop", "ltt", 0.2, 0.1, 0.1, 100, 0.15)
    path = Calibration(MaxProb(0.5), risk, 0.5, "met", "said", 100, promise).save(tmp_path / "c.json")
    assert Calibration.load(path).target == risk
    value = json.loads(path.read_text())
    value["fields"]["target"].update(change)
    path.write_text(json.dumps(value))
    with pytest.raises(FormatError, match=next(iter(change))):
        Calibration.load(path)


def test_auto_is_ltt_but_for_signed_losses_and_prints_so():
    assert Risk(0.01).used == Risk(0.01, loss="disagreement").used == "ltt"
    assert Risk(0.01, loss="signed drop").used == "betting"
    assert (Risk(0.01).least, Risk(0.01, loss="signed drop").least) == (0.0, -1.0)
    assert str(Risk(0.01)) == "drop at most 1 %, with 90 % confidence"
    assert str(Risk(0.01, method="crc")) == "drop at most 1 %, in the mean"
    assert "certify rows only" in str(Risk(0.01, method="plain"))
    assert str(Joint(Risk(0.01), Budget(fraction=0.5))).startswith("cheapest with drop at most 1 %")


# --- what is certified ---


def test_the_last_policy_that_was_certified_is_given_not_the_first_that_was_not():
    # of 1000 rows 6 may be lost at 1 % and 10 %: P(Bin(1000, .01) <= 6) = 0.1289, <= 5 is 0.0661
    risk = Risk(0.01)
    assert certified(counts([0, 2, 5, 6, 9], 1000), risk) == 2
    assert certified(counts([0, 2, 5], 1000), risk) == 2
    assert certified(counts([6, 0, 0], 1000), risk) == -1
    assert certified(counts([0], 1000), risk) == 0


@pytest.mark.parametrize("method", ["ltt", "betting", "plain", "crc"])
def test_what_comes_after_the_first_failure_is_not_looked_at(method):
    losses = counts([0, 1, 900, 0, 0], 1000)
    assert certified(losses, Risk(0.05, method=method)) == 1


@pytest.mark.parametrize("method", ["ltt", "betting"])
def test_losses_between_0_and_1_and_signed_ones(method):
    # means of 0, 2, 3 and 15 %
    assert certified(0.5 * counts([0, 40, 60, 300], 1000), Risk(0.06, method=method)) == 2
    signed = counts([0, 0, 0], 1000)
    signed[1, :300], signed[2, :100] = -1.0, 1.0
    assert certified(signed, Risk(0.02, loss="signed drop")) == 1


def test_conformal_risk_control_by_hand():
    # 99 rows: R <= (100 eps - 1) / 99, so at 0.05 at most 4 rows
    risk = Risk(0.05, method="crc")
    assert certified(counts([0, 3, 4, 5], 99), risk) == 2
    # rows lost at one place stay lost: 3 and 3 others are 6, though each policy alone loses 3
    rows = torch.zeros(3, 99)
    rows[1, :3], rows[2, 3:6] = 1.0, 1.0
    assert certified(rows, risk) == 1
    assert certified(counts([0], 18), risk) == -1  # (19 eps - 1) / 18 < 0
    assert certified(counts([0], 19), risk) == 0
    assert needed_rows(torch.zeros(5), risk) == 19


def test_plain_is_the_mean_alone():
    assert certified(counts([0, 1, 2, 3], 20), Risk(0.1, method="plain")) == 2
    assert certified(counts([0, 0, 1], 20), Risk(0.0, method="plain")) == 1


@pytest.mark.parametrize("method", ["ltt", "betting", "crc"])
def test_no_loss_at_all_cannot_be_promised(method):
    assert certified(torch.zeros(4, 100_000), Risk(0.0, method=method)) == -1


def test_losses_by_hand():
    # full model: 0 0 1 1, labels: 0 1 1 0
    full = torch.eye(2)[[0, 0, 1, 1]]
    trace = ExitTrace(torch.stack([full, full]), labels=torch.tensor([0, 1, 1, 0]))

    def said(*answers: int) -> Said:
        return Said(torch.zeros(4, dtype=torch.int64), torch.tensor(answers), (1.0, 0.0), 0.5)

    policies = [said(0, 0, 1, 1), said(1, 1, 1, 0), said(1, 1, 0, 1)]
    assert losses_of(policies, trace, "drop").tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0]]
    assert losses_of(policies, trace, "signed drop").tolist() == [[0, 0, 0, 0], [1, -1, 0, -1], [1, -1, 1, 0]]
    expected = [[0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 0]]
    assert losses_of(policies, trace, "disagreement").tolist() == expected
    bare = ExitTrace(trace.logits)
    assert losses_of(policies, bare, "disagreement").tolist() == expected
    for loss in ("drop", "signed drop"):
        with pytest.raises(DataError, match=f"the loss '{loss}' needs labels"):
            losses_of(policies, bare, loss)


# --- end to end ---

FIT, CERTIFY, COSTS = synthetic(4, 5, 1000), synthetic(4, 5, 2000, seed=1), even(4)
SHARED = Calibrator(MaxProb, FIT, COSTS)
RISKS = [
    Risk(0.03), Risk(0.05, 0.01), Risk(0.05, loss="disagreement"), Risk(0.05, method="betting"),
    Risk(0.03, loss="signed drop"), Risk(0.03, method="crc"), Risk(0.03, method="plain"),
]  # fmt: skip


def losses_at(policy, trace: ExitTrace, loss: str) -> torch.Tensor:
    return losses_of([Sweep(trace, COSTS)(policy)], trace, loss)[0]


@pytest.mark.parametrize("risk", RISKS, ids=str)
def test_a_risk_is_met_and_said(risk):
    made = SHARED.to(risk, CERTIFY)
    promise = made.promise
    assert (made.status, made.rows, made.target) == ("met", 1000, risk)
    assert 0.25 <= made.achieved < 1
    assert made.achieved == pytest.approx(simulate(made.policy, CERTIFY, COSTS).cost)
    assert (promise.loss, promise.method, promise.rows) == (risk.loss, risk.used, 2000)
    assert promise.observed == pytest.approx(float(losses_at(made.policy, CERTIFY, risk.loss).mean()), abs=1e-6)
    assert promise.observed <= risk.epsilon == promise.epsilon
    assert promise.needed is None
    said = f"{risk.loss} of at most {100 * risk.epsilon:.3g} % is promised"
    if risk.used == "plain":
        assert "Nothing is promised for new rows" in made.message
    elif risk.used == "crc":
        assert f"{said} in the mean" in made.message
        assert (promise.delta, promise.bound) == (0.0, None)
    else:
        assert f"{said} with {100 * (1 - risk.delta):g} % confidence" in made.message
        assert promise.delta == risk.delta
        assert promise.observed < promise.bound <= risk.epsilon + 1e-9


def test_a_smaller_risk_costs_more():
    costs = [SHARED.to(Risk(e), CERTIFY).achieved for e in (0.005, 0.02, 0.05, 0.2)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]
    assert SHARED.to(Risk(0.02, 0.3), CERTIFY).achieved <= SHARED.to(Risk(0.02, 0.01), CERTIFY).achieved


def test_too_few_rows_say_how_many_are_needed():
    for loss, needed in (("drop", 230), ("disagreement", 230), ("signed drop", 318)):
        made = SHARED.to(Risk(0.01, loss=loss), synthetic(4, 5, 10, seed=1))
        assert made.status == "infeasible"
        assert f"10 certify rows are too few: even without any loss {needed} are needed" in made.message
        assert visits(made.policy, 4) == (3,)
        assert made.achieved == 1.0
        assert (made.promise.rows, made.promise.bound, made.promise.delta) == (10, None, 0.0)


@pytest.mark.parametrize(("loss", "needed"), [("drop", 230), ("disagreement", 230), ("signed drop", 318)])
def test_one_row_fewer_than_needed_and_as_many(loss, needed):
    labels = torch.arange(needed) % 5
    sure = ExitTrace((5 * one_hot(labels, 5)).float().expand(4, -1, -1), labels=labels)
    assert SHARED.to(Risk(0.01, loss=loss), sure).status == "met"
    short = SHARED.to(Risk(0.01, loss=loss), sure.select(torch.arange(needed - 1)))
    assert short.status == "infeasible"
    assert f"{needed - 1} certify rows are too few: even without any loss {needed}" in short.message


def test_a_risk_of_nothing_is_infeasible():
    made = SHARED.to(Risk(0.0), CERTIFY)
    assert made.status == "infeasible"
    assert "no number of rows can show that" in made.message
    assert visits(made.policy, 4) == (3,)


def test_a_family_that_always_loses_says_so():
    labels = torch.arange(600) % 2
    wrong, right = 6.0 * one_hot(1 - labels, 2), 5.0 * one_hot(labels, 2)
    made = calibrate(MaxProb, ExitTrace(torch.stack([wrong, right]), labels=labels), even(2), Risk(0.05))
    assert made.status == "best_effort"
    assert "the safest policy already loses 100.00 % of 300 certify rows. Every" in made.message
    assert simulate(made.policy, synthetic(2, 2, 50), even(2)).shares == (0.0, 1.0)


def test_without_certify_rows_the_trace_is_halved():
    whole = synthetic(4, 5, 1200, seed=4)
    fit, certify = whole.split((0.5, 0.5))
    assert not set(fit.ids) & set(certify.ids)
    assert len(fit.ids) + len(certify.ids) == 1200
    made = calibrate(MaxProb, whole, COSTS, Risk(0.05))
    assert made == calibrate(MaxProb, fit, COSTS, Risk(0.05), certify=certify)
    assert made.rows + made.promise.rows == 1200


def test_certify_rows_of_another_model_are_refused():
    with pytest.raises(ShapeError, match="3 exits and 5 classes, the others 4 and 5"):
        calibrate(MaxProb, FIT, COSTS, Risk(0.05), certify=synthetic(3, 5, 100))
    with pytest.raises(ShapeError, match="give certify="):
        Calibrator(MaxProb, FIT, COSTS).to(Risk(0.05))


LONG = {"eero", "eenet", "msdnet", "stopping"} & set(CHOICES)
SLOW = [pytest.param(way, marks=pytest.mark.slow) for way in sorted(LONG)]


@pytest.mark.parametrize("way", [*sorted(set(CHOICES) - LONG - {"berxit"}), *SLOW])
def test_every_family_can_be_given_a_risk(way):
    family, options = CHOICES[way]
    options = {**options, "fit": EENetFit(steps=20)} if family is EENet else options
    fit, certify, costs = synthetic(3, 3, 200), synthetic(3, 3, 600, seed=1), even(3)
    calibrator = Calibrator(family, fit, costs, Options(**options))
    made = calibrator.to(Risk(0.15, loss="disagreement"), certify)
    # fixed and voting have few steps, and the first may lose too much
    assert made.status == "met" or way in ("fixed", "voting", "patience", "f-pabee")
    assert made.promise.observed <= 0.15
    outcome = simulate(made.policy, certify, costs)
    assert made.achieved == pytest.approx(outcome.cost)
    path = calibrator.path()
    spent = [calibrator.spent(policy, Budget(fraction=1.0)) for policy in path]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(spent))
    assert spent[0] == 1.0
    assert spent[-1] == pytest.approx(2 / 3 if way == "voting" else 1 / 3)
    assert visits(path[0], 3) == (2,)
    assert made.policy in path


# --- both at once ---


def test_the_cheapest_within_both():
    alone = SHARED.to(Risk(0.05), CERTIFY)
    spent = simulate(alone.policy, FIT, COSTS).cost
    for share, status in ((1.01, "met"), (0.99, "best_effort")):
        made = SHARED.to(Joint(Risk(0.05), Budget(fraction=share * spent)), CERTIFY)
        assert (made.policy, made.promise, made.status) == (alone.policy, alone.promise, status)
        assert made.achieved == pytest.approx(spent)
        assert ("more than there is" in made.message) == (status == "best_effort")
        assert made.message.startswith(alone.message)
    few = SHARED.to(Joint(Risk(0.01), Budget(fraction=0.5)), synthetic(4, 5, 10))
    assert few.status == "infeasible"


@pytest.mark.parametrize("loss", ["drop", "signed drop"])
def test_the_safest_within_a_budget(loss):
    plain = SHARED.to_budget(Budget(fraction=0.8))
    losses = losses_at(plain.policy, CERTIFY, loss)
    bound = promise_of(losses, Risk(0.5, loss=loss)).bound
    for epsilon, status in ((bound * 1.05, "met"), (bound * 0.95, "best_effort")):
        target = Joint(Risk(epsilon, loss=loss), Budget(fraction=0.8), "safest")
        made = SHARED.to(target, CERTIFY)
        assert (made.policy, made.achieved, made.status) == (plain.policy, plain.achieved, status)
        assert made.promise.epsilon == made.promise.bound == pytest.approx(bound)
        assert ("above the" in made.message) == (status == "best_effort")
    target = Joint(Risk(0.05, loss=loss), Budget(fraction=0.1), "safest")
    made = SHARED.to(target, CERTIFY)
    assert (made.status, made.promise) == ("infeasible", None)


def test_files_keep_risk_and_promise(tmp_path):
    targets = [*RISKS, Risk(0.0), Joint(Risk(0.04), Budget(fraction=0.7))]
    targets += [Joint(Risk(0.04), Budget(fraction=0.7), "safest")]
    for target in targets:
        made = SHARED.to(target, CERTIFY)
        again = Calibration.load(made.save(tmp_path / "c.json"))
        assert again == made
        assert isinstance(again.promise, Promise)


# --- a promise holds: certify rows drawn again and again from a pool whose risk is known ---

DRAWS, ROWS, POOL = 300, 1000, 20_000


def pool_losses(loss: str) -> torch.Tensor:
    """Losses of policies fixed beforehand, thresholds falling from one that keeps every row."""
    pool = synthetic(4, 5, POOL, seed=7)
    sweep = Sweep(pool, COSTS)
    thresholds = [2.0, *torch.linspace(0.99, 0.3, 100).tolist()]
    return losses_of([sweep(MaxProb((t,) * 4)) for t in thresholds], pool, loss)


@pytest.mark.parametrize(
    ("loss", "method"),
    [
        ("drop", "ltt"), ("disagreement", "ltt"), ("drop", "betting"), ("signed drop", "betting"), ("drop", "crc"),
        ("drop", "plain"),
    ],
)  # fmt: skip
def test_a_promise_holds(loss, method):
    risk = Risk(0.03, 0.1, loss, method)
    losses = pool_losses(loss)
    true = losses.double().mean(dim=1)
    assert true[0] <= 0.0
    assert true[-1] > 2 * risk.epsilon
    g = torch.Generator().manual_seed(11)
    found = []
    for _ in range(DRAWS):
        place = certified(losses[:, torch.randint(POOL, (ROWS,), generator=g)], risk)
        found.append(float(true[max(0, place)]))
    risks = torch.tensor(found, dtype=torch.float64)
    failed = float((risks > risk.epsilon).double().mean())
    if method == "crc":
        assert float(risks.mean()) <= risk.epsilon + 3 * float(risks.std()) / math.sqrt(DRAWS)
    elif method == "plain":
        assert failed > 0.25
    else:
        assert failed <= risk.delta + 3 * math.sqrt(risk.delta * (1 - risk.delta) / DRAWS)
        assert float(risks.mean()) > risk.epsilon / 3  # nor is it kept by letting nobody leave


# --- what is called certain is ---


def leaning(rows: int, seed: int) -> ExitTrace:
    """A last exit that leans to class 0, so that a mixture with fitted biases says something else."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (rows,), generator=g)
    logits = torch.randn(3, rows, 3, generator=g) + one_hot(labels, 3) * torch.arange(1, 4)[:, None, None]
    logits[-1, :, 0] += 2
    return ExitTrace(logits, labels=labels)


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "berxit"])
def test_where_no_row_leaves_the_plain_model_answers(name):
    fit, rows = leaning(200, 0), leaning(150, 1)
    family, options = CHOICES[name]
    made = Calibrator(family, fit, even(3), Options(**options))
    outcome = simulate(made.off, rows, even(3))
    assert set(outcome.exit.tolist()) == {2}
    assert torch.equal(outcome.answer.argmax(-1), rows.logits[-1].argmax(-1))
    assert torch.allclose(outcome.answer.softmax(-1), rows.logits[-1].softmax(-1), atol=1e-6)
    found = made.to(Risk(0.001, loss="disagreement"), rows)
    assert simulate(found.policy, rows, even(3)).answer.argmax(-1).equal(rows.logits[-1].argmax(-1))
    assert (found.promise.observed, found.promise.delta) == (0.0, 0.0)
    assert made.path()[0] == made.off


@pytest.mark.parametrize("target", [Risk(0.1, loss="disagreement"), Joint(Risk(0.1), Budget(fraction=0.5))])
def test_what_counts_classes_is_not_asked_of_other_tasks(target):
    numbers = ExitTrace(torch.randn(3, 50, 1, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueRangeError, match="task='regression'.*Give it a Budget"):
        calibrate(Patience(0, task="regression", tolerance=0.1), numbers, even(3), target)


def test_rows_that_were_fitted_on_certify_nothing():
    trace = leaning(100, 0)
    with pytest.raises(DataError, match="100 of 100 certify rows are also used"):
        calibrate(MaxProb, trace, even(3), Risk(0.1), certify=leaning(100, 0))
    named = ExitTrace(trace.logits, labels=trace.labels, ids=tuple(map(str, range(100))), source="reviews.csv")
    with pytest.raises(DataError, match="30 of 30 certify rows"):
        calibrate(MaxProb, named, even(3), Risk(0.1), certify=named.select(torch.arange(30)))


def test_nothing_leaves_so_nothing_is_lost_whatever_the_rows():
    both = Joint(Risk(0.01), Budget(fraction=1.0), "safest")
    made = calibrate(MaxProb, leaning(100, 0), even(3), both, certify=leaning(20, 1))
    assert made.status == "met"
    assert (made.promise.epsilon, made.promise.delta, made.promise.observed) == (0.0, 0.0, 0.0)


def test_stages_that_cost_nothing_can_be_given_a_risk():
    free = CostModel((0.0, 0.5, 0.5), (0.0, 0.0, 0.0))
    made = calibrate(MaxProb, leaning(300, 0), free, Risk(0.3), certify=leaning(300, 1))
    assert made.status in ("met", "best_effort")


def test_a_budget_that_the_plain_model_meets_is_met_though_heads_are_dear():
    dear = CostModel((0.2, 0.4, 0.4), (1.5, 0.1, 0.0))
    made = calibrate(MaxProb, leaning(100, 0), dear, Budget(fraction=1.2))
    assert (made.status, made.achieved) == ("met", 1.0)


def test_more_rows_than_there_are_are_asked_for():
    made = calibrate(MaxProb, leaning(600, 0), even(3), Risk(0.05, loss="signed drop"), certify=leaning(400, 1))
    assert made.promise.needed is None or made.promise.needed > 400
