import pytest
import torch

from offramp.cost import CostModel
from offramp.errors import ShapeError
from offramp.policies import BEEM, Entropy, Evidence, MaxProb, Patience
from offramp.simulate import simulate, walk
from offramp.trace import ExitTrace

COSTS = CostModel(stage=(0.25, 0.25, 0.5), head=(0.1, 0.1, 0.0))


def trace() -> ExitTrace:
    sure, unsure, other = [9.0, 0.0], [0.1, 0.0], [0.0, 9.0]
    logits = torch.tensor([[sure, unsure, unsure, sure], [sure, other, unsure, other], [sure, sure, sure, other]])
    return ExitTrace(logits, labels=torch.tensor([0, 0, 0, 1]))


def test_outcome_by_hand():
    outcome = simulate(MaxProb(0.9), trace(), COSTS)
    assert outcome.exit.tolist() == [0, 1, 2, 0]
    assert outcome.shares == (0.5, 0.25, 0.25)
    assert outcome.cost == pytest.approx((2 * 0.35 + 0.7 + 1.2) / 4)
    assert outcome.right.tolist() == [True, False, True, False]
    assert outcome.accuracy == 0.5
    assert torch.equal(outcome.answer, torch.stack([trace().logits[k, i] for i, k in enumerate((0, 1, 2, 0))]))


def test_heads_that_are_off_cost_nothing():
    outcome = simulate(MaxProb(0.9, (False, True, True)), trace(), COSTS)
    assert outcome.exit.tolist() == [1, 1, 2, 1]
    assert outcome.cost == pytest.approx((3 * 0.6 + 1.1) / 4)


def test_the_last_exit_takes_everybody_left():
    for policy in (MaxProb(2.0), Entropy(2.0), BEEM((1.0,) * 3, 99.0), Patience(99), MaxProb(2.0, (True, True, False))):
        outcome = simulate(policy, trace(), COSTS)
        assert outcome.exit.tolist() == [2] * 4
        assert sum(outcome.shares) == 1.0
        assert walk(policy, trace()).stop.sum(dim=0).tolist() == [1] * 4


def test_without_labels():
    outcome = simulate(MaxProb(0.9), ExitTrace(trace().logits), COSTS)
    assert outcome.right is None
    assert outcome.accuracy is None


def test_one_row_one_exit_and_no_survivors():
    one = ExitTrace(torch.zeros(1, 1, 2))
    assert simulate(MaxProb(0.9), one, CostModel.from_costs((1.0,))).exit.tolist() == [0]
    for policy in (MaxProb(0.9), Entropy(0.9), Patience(1), BEEM((1.0, 1.0), 0.5)):
        nobody = Evidence(torch.zeros(0, 2))
        step = policy.step(0, nobody, policy.init(nobody))
        step = policy.step(1, nobody, step.state)
        assert step.stop.shape == step.score.shape == (0,)
        assert step.answer.shape == (0, 2)


def test_mismatches_are_named():
    with pytest.raises(ShapeError, match="2 exits and the trace 3"):
        simulate(MaxProb(0.9), trace(), CostModel.from_costs((0.5, 1.0)))
    with pytest.raises(ShapeError, match="thresholds has 2"):
        simulate(MaxProb((0.9, 0.9)), trace(), COSTS)
    with pytest.raises(ShapeError, match="enabled has 2"):
        simulate(Patience(1, (True, True)), trace(), COSTS)


def test_signals_are_asked_for():
    class Needs(MaxProb):
        needs = ("certainty",)

    with pytest.raises(ShapeError, match="certainty"):
        walk(Needs(0.5), trace())
