"""EENet's features and scores, worked by hand from arXiv 2301.07099 and the authors' code."""

import math

import pytest
import torch

from offramp.calibrate import quota_thresholds
from offramp.cost import CostModel
from offramp.policies import Array, EENet, Evidence
from offramp.policies.eenet import features
from offramp.simulate import simulate
from offramp.trace import ExitTrace

P = torch.tensor([[math.log(0.9), math.log(0.1)], [math.log(0.5), math.log(0.5)]])


def test_features():
    past = torch.tensor([[0.25], [1.0]])
    # p, max p, 1 - entropy in bits (0.468996 and 1), q of the exit before
    assert features(P, past, True).tolist() == [
        pytest.approx([0.9, 0.1, 0.9, 0.531004, 0.25], abs=2e-6),
        pytest.approx([0.5, 0.5, 0.5, 0.0, 1.0], abs=2e-6),
    ]
    assert features(P, past, False)[0].tolist() == pytest.approx([0.9, 0.531004, 0.25], abs=2e-6)


def test_the_score_is_compared_unclamped_and_fed_on_clamped():
    # exit 0: 2 p_0 + 1 = 2.8 and 2.0: both q are 1.0 after the clamp, and a threshold of 2.5 still tells them apart
    # exit 1: q_0 - 0.25 p_0 = 1 - .225 = .775 and 1 - .125 = .875 (unclamped past scores would give 2.575 and 1.875)
    first, second = Array([2.0, 0.0, 0.0, 0.0]), Array([-0.25, 0.0, 0.0, 0.0, 1.0])
    bias = Array([2.0 + 1.0, 1.0, 0.0, 0.0])  # p sums to 1: 3 p_0 + p_1 = 2 p_0 + 1
    policy = EENet(((bias,), (second,), (Array([0.0] * 6),)), (2.5, 0.8, 0.0))
    state = policy.init(Evidence(P))
    assert state[0].shape == (2, 0)
    step = policy.step(0, Evidence(P), state)
    assert step.score.tolist() == pytest.approx([2.8, 2.0], abs=1e-5)
    assert step.stop.tolist() == [True, False]
    assert step.state[0].tolist() == [[1.0], [1.0]]
    step = policy.step(1, Evidence(P), step.state)
    assert step.score.tolist() == pytest.approx([0.775, 0.875], abs=1e-5)
    assert step.stop.tolist() == [False, True]
    assert step.state[0].shape == (2, 2)
    # below 0 it is clamped to 0 before it is fed on: -2 p_0
    low = EENet(((Array([-2.0, 0.0, 0.0, 0.0]),), (second,)), 0.0)
    step = low.step(0, Evidence(P), low.init(Evidence(P)))
    assert step.score.tolist() == pytest.approx([-1.8, -1.0], abs=1e-5)
    assert step.state[0].tolist() == [[0.0], [0.0]]
    assert first != bias


def test_mlp_score():
    # a = [.9, .531004]; hidden = sigmoid(1*.9 - 0.9 + 0) = .5 and sigmoid(0*a + ln 3) = .75
    # score = 2*.5 - 4*.75 + 1.5 = -.5;  q = sigmoid(-.5) = .377541
    part = (Array([[1.0, 0.0], [0.0, 0.0]]), Array([-0.9, math.log(3)]), Array([2.0, -4.0]), Array(1.5))
    policy = EENet((part,), -0.6, scorer="mlp", class_scores=False)
    step = policy.step(0, Evidence(P[:1]), policy.init(Evidence(P[:1])))
    assert step.score.item() == pytest.approx(-0.5, abs=1e-5)
    assert step.state[0].item() == pytest.approx(0.377541, abs=1e-5)
    assert step.stop.item()


def test_a_row_with_a_negative_last_score_leaves_at_the_last_exit():
    never = Array([-1.0, -1.0, 0.0, 0.0])
    policy = EENet(((never,), (Array([-1.0, -1.0, 0.0, 0.0, 0.0]),)), 0.0)
    made = ExitTrace(torch.stack([P, P]), labels=torch.tensor([0, 0]))
    outcome = simulate(policy, made, CostModel.from_costs((0.5, 1.0)))
    assert outcome.exit.tolist() == [1, 1]
    assert sum(outcome.shares) == 1.0


def test_q_of_a_switched_off_exit_is_no_feature():
    flags = (True, False, True)
    scorers = ((Array([1.0, 0, 0, 0]),), (Array([0.0]),), (Array([0.0, 0, 0, 0, 1]),))
    policy = EENet(scorers, 9.0, enabled=flags)
    outcome = simulate(policy, ExitTrace(torch.stack([P, -P, P])), CostModel.from_costs((1, 2, 3)))
    assert outcome.score.tolist() == pytest.approx([0.9, 0.5], abs=1e-6)  # exit 0's q, passed by exit 1


def test_quotas_by_hand():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5], [0.1, 0.2, 0.9, 0.4, 0.3]])
    # exit 0 takes floor(.4*5) = 2: rows 0 and 1, t = .8; exit 1 takes floor(.39*5) = 1 of rows 2 3 4: row 2, t = .9
    thresholds, on = quota_thresholds(scores, (0.4, 0.39, 0.21))
    assert thresholds == pytest.approx((0.8, 0.9))
    assert on == (True, True)
    # a quota of no row switches off: floor(.19*5) = 0; the next then takes from all rows
    thresholds, on = quota_thresholds(scores, (0.19, 0.4, 0.41))
    assert on == (False, True)
    assert thresholds[1] == pytest.approx(0.4)
    # 0.6 * 5 in floats is 3, not 2
    assert quota_thresholds(scores, (0.6, 0.0, 0.4))[0][0] == pytest.approx(0.7)
    # a tie leaves together: quota 1 takes both rows of 1.0, and the next exit has the other one
    tied = torch.tensor([[1.0, 1.0, 0.2], [0.3, 0.9, 0.1]])
    thresholds, on = quota_thresholds(tied, (0.34, 0.34, 0.32))
    assert thresholds == pytest.approx((1.0, 0.1))
