"""F-PABEE's divergences and its count, worked by hand from arXiv 2305.11916.

Two classes; p is the probability of the first. In nats:

    1/2 -> 1/4   kl          1/2 ln 2 + 1/2 ln 2/3             = 1/2 ln 4/3 = .143841
                 kl-reverse  1/4 ln 1/2 + 3/4 ln 3/2           = -.173287 + .304099 = .130812
                 symmetric   (.143841 + .130812) / 2           = .137326
                 js          middle 3/8: 1/2 ln 4/3 + 1/2 ln 4/5 = 1/2 ln 16/15 = .032269
                                         1/4 ln 2/3 + 3/4 ln 6/5 = -.101366 + .136741 = .035375
                             half their sum                      = .033822
    3/4 -> 1/4   kl either way  3/4 ln 3 - 1/4 ln 3            = 1/2 ln 3 = .549306
                 js          middle 1/2: ln 2 - H(1/4)           = .693147 - .562335 = .130812
"""

import math

import pytest
import torch

from offramp.cost import CostModel
from offramp.policies import FPABEE, Patience
from offramp.policies.fpabee import divergence
from offramp.simulate import simulate, walk
from offramp.trace import ExitTrace

HALF, QUARTER, MOST = 0.0, -math.log(3), math.log(3)  # log odds of 1/2, 1/4, 3/4


def row(*p: float) -> ExitTrace:
    """One row of two classes, from the first class's probability at every exit."""
    return ExitTrace(torch.tensor([[[math.log(v / (1 - v)), 0.0]] for v in p]))


def exit_of(policy, made: ExitTrace) -> int:
    return simulate(policy, made, CostModel.from_costs([k + 1.0 for k in range(made.exits)])).exit.item()


@pytest.mark.parametrize(
    ("measure", "far", "farther"),
    [
        ("kl", 0.143841, 0.549306),
        ("kl-reverse", 0.130812, 0.549306),
        ("symmetric", 0.137326, 0.549306),
        ("js", 0.033822, 0.130812),
    ],
)
def test_divergences(measure, far, farther):
    before, now = torch.tensor([[HALF, 0.0], [MOST, 0.0]]), torch.tensor([[QUARTER, 0.0], [QUARTER, 0.0]])
    assert divergence(before, now, measure, "classes").tolist() == pytest.approx([far, farther], abs=2e-6)
    # two labels that move so: 1/2 to 1/4 and 3/4 to 1/4; for kl the sum is 1/2 ln 4/3 + 1/2 ln 3 = ln 2
    labels = divergence(torch.tensor([[HALF, MOST]]), torch.tensor([[QUARTER, QUARTER]]), measure, "multilabel")
    assert labels.item() == pytest.approx(far + farther, abs=4e-6)
    # a constant added to every logit moves no class
    assert divergence(now + 7.0, now, measure, "classes").tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_kl_runs_from_the_exit_before():
    # 1/2 -> 1/4: kl .1438, reverse .1308; back again they change places
    there, back = row(0.5, 0.25, 0.9), row(0.25, 0.5, 0.9)
    assert [exit_of(FPABEE(0.137, 1, m), there) for m in ("kl", "kl-reverse", "symmetric", "js")] == [2, 1, 2, 1]
    assert [exit_of(FPABEE(0.137, 1, m), back) for m in ("kl", "kl-reverse", "symmetric", "js")] == [1, 2, 2, 1]


@pytest.mark.parametrize(
    ("tau", "counts", "exits"),
    [
        # p      1/2    1/4   1/4   3/4     3/4   3/4
        # js      -    .0338   0   .1308     0     0       exits for patience 0, 1, 2, 3
        (0.02, [0, 0, 1, 0, 1, 2], [0, 2, 5, 5]),
        (0.05, [0, 1, 2, 0, 1, 2], [0, 1, 2, 5]),
        (0.2, [0, 1, 2, 3, 4, 5], [0, 1, 2, 3]),
    ],
)
def test_counts(tau, counts, exits):
    made = row(0.5, 0.25, 0.25, 0.75, 0.75, 0.75)
    assert walk(FPABEE(tau, 99), made).score[:, 0].tolist() == counts
    assert [exit_of(FPABEE(tau, patience), made) for patience in range(4)] == exits


def test_it_sees_more_than_the_label():
    # .55 -> .95 keeps the label, yet js = .119: middle 3/4
    #   .55 ln .55/.75 + .45 ln .45/.25 = -.170585 + .264504 = .093919
    #   .95 ln .95/.75 + .05 ln .05/.25 =  .224569 - .080472 = .144097, half the sum .119008
    same = row(0.55, 0.95, 0.2)
    assert divergence(same.logits[0], same.logits[1], "js", "classes").item() == pytest.approx(0.119008, abs=2e-6)
    assert exit_of(Patience(1), same) == 1
    assert exit_of(FPABEE(0.1), same) == 2
    # .51 -> .49 turns the label and hardly moves: about (.02)^2 / (8 * 1/4) = .0002
    turned = row(0.51, 0.49, 0.9)
    assert divergence(turned.logits[0], turned.logits[1], "js", "classes").item() == pytest.approx(0.0002, rel=1e-3)
    assert exit_of(Patience(1), turned) == 2
    assert exit_of(FPABEE(0.1), turned) == 1


def test_regression_moves_by_the_difference_and_tau_itself_is_too_far():
    made = ExitTrace(torch.tensor([1.0, 1.5, 1.75, 1.75, 0.0]).reshape(5, 1, 1))  # moves 1/2, 1/4, 0, 7/4
    assert walk(FPABEE(0.5, 99, task="regression"), made).score[:, 0].tolist() == [0, 0, 1, 2, 0]
    assert walk(FPABEE(0.51, 99, task="regression"), made).score[:, 0].tolist() == [0, 1, 2, 3, 0]
    assert exit_of(FPABEE(0.5, 2, task="regression"), made) == 3


def test_neighbours_skip_an_exit_that_is_off():
    made = row(0.5, 0.9, 0.5, 0.1)
    assert exit_of(FPABEE(0.01), made) == 3
    assert exit_of(FPABEE(0.01, 1, "js", (True, False, True, True)), made) == 2
    assert exit_of(FPABEE(0.01, 0, "js", (False, True, True, True)), made) == 1


def test_certain_rows_have_finite_divergences():
    sure, other = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    assert divergence(sure, sure, "symmetric", "classes").item() == 0.0
    assert divergence(sure, other, "js", "classes").item() == pytest.approx(math.log(2))  # its largest value
    assert divergence(sure, other, "kl", "classes").item() == pytest.approx(200.0)  # 1 ln(1 / e^-200)
