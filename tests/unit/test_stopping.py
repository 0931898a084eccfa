"""Stopping: mixtures lower the cross-entropy, gates learn what they should, and the better of both kinds is chosen."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from offramp import Budget, CostModel, DataError, ExitTrace, MaxProb, Stopping, calibrate
from offramp.calibrate import Calibrator, Options
from offramp.calibrate.learned import gates_backwards, gates_in_hindsight, logistic, multinomial
from offramp.calibrate.stopping import Candidate, StoppingFit, fit_mixture
from offramp.policies import Array
from offramp.policies.base import Evidence
from offramp.policies.stopping import surety
from offramp.simulate import simulate

COSTS = CostModel.from_costs((0.25, 0.5, 0.75, 1.0))
TRACES = Path(__file__).parents[1] / "traces"


def made(rows: int, *, own_noise: float, seed: int = 0) -> ExitTrace:
    """Exits with errors of their own, so that several together know more than the last alone."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (rows,), generator=g)
    truth = F.one_hot(labels, 3) * 2.0 * torch.rand(rows, 1, generator=g)
    shared = torch.randn(rows, 3, generator=g)
    depth = torch.tensor([0.7, 0.9, 1.1, 1.2])[:, None, None]
    return ExitTrace(depth * truth + 0.3 * shared + own_noise * torch.randn(4, rows, 3, generator=g), labels)


def only(mixture: str, rule: str) -> Options:
    return Options(stopping=StoppingFit(candidates=(Candidate(mixture, rule),)))


def test_without_a_mixture_and_gates_it_is_max_prob():
    trace, test = made(800, own_noise=1.0), made(900, own_noise=1.0, seed=1)
    for fraction in (0.3, 0.6, 0.9):
        ours = Calibrator(Stopping, trace, COSTS, only("own", "shared")).to(Budget(fraction=fraction)).policy
        theirs = calibrate(MaxProb, trace, COSTS, Budget(fraction=fraction)).policy
        assert ours.thresholds == pytest.approx(theirs.thresholds, abs=1e-6)
        a, b = simulate(ours, test, COSTS), simulate(theirs, test, COSTS)
        assert (a.exit == b.exit).double().mean() > 0.995
        assert a.accuracy == pytest.approx(b.accuracy, abs=3e-3)


def test_a_mixture_knows_more_than_an_exit_where_errors_are_their_own():
    trace, test = made(1500, own_noise=1.5), made(3000, own_noise=1.5, seed=1)
    weights, biases = fit_mixture(trace, (True,) * 4, 1e-3, bias=True)
    assert torch.equal(weights, weights.tril())
    said = torch.log_softmax(test.logits, dim=-1)
    for k in range(1, 4):
        mixed = torch.einsum("j,jnc->nc", weights[k], said) + biases[k]
        assert F.cross_entropy(mixed, test.labels) < F.cross_entropy(test.logits[k], test.labels) - 0.05
    target = Budget(fraction=0.7)
    found = calibrate(Stopping, trace, COSTS, target)
    assert found.policy.weights.tensor(torch.device("cpu"))[3, 0] > 0.1
    plain = calibrate(MaxProb, trace, COSTS, target)
    ours, theirs = simulate(found.policy, test, COSTS), simulate(plain.policy, test, COSTS)
    assert ours.accuracy > theirs.accuracy + 0.02
    assert abs(ours.cost - theirs.cost) < 0.03


def test_where_a_mixture_gains_nothing_each_exit_answers_alone():
    """Later exits know all that earlier ones do."""
    g = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (2000,), generator=g)
    last = F.one_hot(labels, 3) * 2.0 + torch.randn(2000, 3, generator=g)
    trace = ExitTrace(torch.stack([last] * 4), labels)
    found = calibrate(Stopping, trace, COSTS, Budget(fraction=0.6)).policy
    assert torch.equal(found.weights.tensor(torch.device("cpu")), torch.eye(4))


def test_what_exits_said_is_kept_until_the_last_that_mixes():
    weights = torch.eye(4)
    weights[1, :2] = 0.5
    some = Stopping(0.9, Array(weights), Array(torch.zeros(4, 1)))
    none = replace(some, weights=Array(torch.eye(4)))
    said = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    for policy, kept in ((some, [1, 2, 0, 0]), (none, [0] * 4)):
        state = policy.init(Evidence(said[0]))
        for k, logits in enumerate(said):
            step = policy.step(k, Evidence(logits), state)
            state = step.state
            assert state[0].shape == (3, kept[k], 5)
            own = logits.log_softmax(-1)
            wanted = (0.5 * (own + said[0].log_softmax(-1))).log_softmax(-1) if policy is some and k == 1 else own
            torch.testing.assert_close(step.answer, wanted)


def lucky() -> ExitTrace:
    """Exit 1 is no better than exit 0 and right of other rows, by luck; exits 2 and 3 are right."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (4000,), generator=g)
    weak = F.one_hot(labels, 2) * 1.0 + torch.randn(4000, 2, generator=g)
    strong = F.one_hot(labels, 2) * 6.0 + torch.randn(4000, 2, generator=g)
    return ExitTrace(torch.stack([weak, weak + 0.5 * torch.randn(4000, 2, generator=g), strong, strong]), labels)


def test_hindsight_is_not_chosen_where_it_hopes_for_luck():
    target, right = Budget(fraction=0.35), {}
    for name, options in (("hindsight", only("own", "hindsight")), ("chosen", Options())):
        right[name] = simulate(Calibrator(Stopping, lucky(), COSTS, options).to(target).policy, lucky(), COSTS).accuracy
    assert right["chosen"] > right["hindsight"] + 0.02


@pytest.mark.parametrize("rule", ["shared", "hindsight", "value"])
@pytest.mark.parametrize("mixture", ["own", "weights", "full"])
@pytest.mark.parametrize("flags", [None, (False, True, True, True)])
def test_every_candidate_meets_budgets_from_below(mixture, rule, flags):
    trace = made(600, own_noise=1.0)
    calibrator = Calibrator(Stopping, trace, COSTS, only(mixture, rule), enabled=flags)
    for fraction in (0.55, 0.7, 0.85):
        found = calibrator.to(Budget(fraction=fraction))
        assert found.status == "met", found.message
        assert 0.98 * fraction <= found.achieved <= fraction * (1 + 1e-9)
        assert simulate(found.policy, trace, COSTS).cost == pytest.approx(found.achieved)


def test_a_dear_exit_that_gains_nothing_is_passed_by():
    """Gates by value see past exit 1, a shared threshold cannot."""
    trace, target = lucky(), Budget(fraction=0.5)
    value = Calibrator(Stopping, trace, COSTS, only("own", "value")).to(target).policy
    shared = Calibrator(Stopping, trace, COSTS, only("own", "shared")).to(target).policy
    ours, theirs = simulate(value, trace, COSTS), simulate(shared, trace, COSTS)
    assert ours.shares[1] < theirs.shares[1]
    assert ours.accuracy > theirs.accuracy + 0.01


def test_it_is_deterministic_and_round_trips_with_its_parts():
    trace = made(400, own_noise=1.5)
    one, two = (calibrate(Stopping, trace, COSTS, Budget(fraction=0.6)).policy for _ in range(2))
    assert one == two
    kept = calibrate(replace(one, thresholds=0.0), trace, COSTS, Budget(fraction=0.4)).policy
    assert (kept.weights, kept.biases, kept.gates) == (one.weights, one.biases, one.gates)


def test_labels_are_needed():
    with pytest.raises(DataError, match="Stopping"):
        calibrate(Stopping, ExitTrace(torch.randn(4, 20, 3)), COSTS, Budget(fraction=0.6))


def test_what_gates_see_by_hand():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.7, 0.1]])
    seen = surety(p.log())
    assert seen.tolist() == [pytest.approx([1.0, 0.5, 0.25, 0.0]), pytest.approx([1.0, 0.7, 0.49, 0.5])]
    assert surety(torch.zeros(1, 1)).tolist() == [[1.0, 1.0, 1.0, 1.0]]


def test_gates_in_hindsight_by_hand():
    """Five rows and a feature that is always one: a gate is the log-odds of the share of rows whose best exit is not
    later. Exits cost 0.25, 0.5, 0.75 and 1; at a price of 1, being right is worth going anywhere."""
    right = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
    seen = torch.ones(4, 5, 1)
    gates = gates_in_hindsight(seen, 1.0 - right, COSTS, (True,) * 4, 1.0).flatten()
    # best exits: 0, 1, 1, 2, and 0 for the row that nobody gets right
    shares = torch.sigmoid(gates[:3])
    assert shares.tolist() == pytest.approx([2 / 5, 4 / 5, 1.0], abs=2e-2)
    assert gates[3] == 0
    dear = gates_in_hindsight(seen, 1.0 - right, COSTS, (True,) * 4, 5.0).flatten()
    assert torch.sigmoid(dear[0]) > 0.95  # nothing is worth going on for
    without = gates_in_hindsight(seen[:3], (1.0 - right)[[0, 2, 3]], COSTS, (True, False, True, True), 1.0).flatten()
    assert without[1] == 0
    assert torch.sigmoid(without[0]) == pytest.approx(2 / 5, abs=2e-2)


def test_gates_backwards_by_hand():
    """Exits 2 and 3 are right of one row more than exits 0 and 1."""
    right = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    sure = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0]] * 4)
    seen = torch.stack([torch.ones(4, 5), sure], dim=-1)  # of the first two rows it is known that they are right
    worth = seen @ gates_backwards(seen, 1.0 - right, COSTS, (True,) * 4, 0.5).T  # [visit row exit]
    leaves = [(worth[0, :, k] >= 0).tolist() for k in range(3)]
    assert leaves[2] == [True] * 5  # the last is no better
    # one of three unsure rows gains 1, all three pay 0.125 to go on from exit 1, and 0.25 from exit 0
    assert leaves[1] == leaves[0] == [True, True, False, False, False]
    dear = gates_backwards(seen, 1.0 - right, COSTS, (True,) * 4, 3.0)
    assert ((seen @ dear.T)[0, :, :3] >= 0).all()


def test_multinomial_with_one_parameter_is_a_temperature():
    """The best scale of logits is where the derivative of the cross-entropy is zero."""
    trace = made(2000, own_noise=1.0)
    logits = 3.0 * trace.logits[0]
    (scale,) = multinomial(logits[:, :, None], trace.labels, torch.ones(1), 1e-9).tolist()
    around = [float(F.cross_entropy(logits * s, trace.labels)) for s in (scale - 0.01, scale, scale + 0.01)]
    assert around[1] == min(around)
    assert scale < 0.9


def test_logistic_of_weighted_rows_is_that_of_repeated_ones():
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(40, 2, generator=g), torch.ones(40, 1)], dim=1)
    y, times = (torch.rand(40, generator=g) < 0.4).float(), torch.arange(40) % 3
    weighted = logistic(x, y, weight=times.float())
    again = logistic(x.repeat_interleave(times, dim=0), y.repeat_interleave(times))
    assert weighted.tolist() == pytest.approx(again.tolist(), abs=1e-4)


def test_logistic_with_a_bias_alone_gives_the_rate():
    (bias,) = logistic(torch.ones(200, 1), (torch.arange(200) < 50).float(), 1e-9).tolist()
    assert 1 / (1 + math.exp(-bias)) == pytest.approx(0.25, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sst2", "mrpc"])
def test_on_real_traces_it_is_no_worse_than_max_prob_beyond_noise(name):
    trace, costs = ExitTrace.load(TRACES / f"{name}.safetensors"), CostModel.load(TRACES / f"{name}-costs.json")
    fit, test = trace.split((0.5, 0.5), seed=5)
    ours, theirs = Calibrator(Stopping, fit, costs), Calibrator(MaxProb, fit, costs)
    difference = [
        simulate(ours.to(b).policy, test, costs).accuracy - simulate(theirs.to(b).policy, test, costs).accuracy
        for b in (Budget(fraction=f) for f in (0.4, 0.6, 0.8))
    ]
    assert sum(difference) / 3 > -0.02
