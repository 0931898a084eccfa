"""Zero Time Waste's ensemble and cascade, worked by hand from its formulas.

With two classes only ratios p(first) : p(second) matter, and a mean of exp(w) log p is a product of powers of them:
z adds exponents, so ratio(E_k) = prod_j ratio(p_j) ^ (exp(w_kj) / n) * ratio(exp b_k). A ratio r is p = r / (1 + r).
"""

import math

import pytest
import torch

from offramp.cost import CostModel
from offramp.policies import ZTW, Array
from offramp.simulate import Outcome, simulate, walk
from offramp.trace import ExitTrace

NONE = Array(torch.zeros(2, 2))


def row(*ratios: float) -> ExitTrace:
    """One row of two classes, from its exits' own ratios."""
    return ExitTrace(torch.tensor([[[math.log(r), 0.0]] for r in ratios]))


def ratios(policy: ZTW, made: ExitTrace) -> list[float]:
    """The ensemble's ratio at every visited exit."""
    answer = walk(policy, made).answer[:, 0].exp()
    assert answer.sum(dim=-1).tolist() == pytest.approx([1.0] * len(answer), abs=1e-6)
    return (answer[:, 0] / answer[:, 1]).tolist()


def run(policy: ZTW, made: ExitTrace) -> Outcome:
    return simulate(policy, made, CostModel.from_costs([k + 1.0 for k in range(made.exits)]))


def test_weights_are_exponents_and_the_mean_divides_them():
    # exit 0: w_00 = ln 1/2: 4^(1/2) = 2
    # exit 1: w_10 = 0, w_11 = ln 3: (4^1 * 9^3)^(1/2) = 2 * 27 = 54
    weights = Array([[math.log(0.5), 99.0], [0.0, math.log(3)]])  # 99 is above the diagonal and not used
    assert ratios(ZTW(2.0, weights, NONE), row(4.0, 9.0)) == pytest.approx([2.0, 54.0], rel=1e-4)


def test_biases_are_factors():
    # weights 0: 4 and (4 * 9)^(1/2) = 6; b_0 = (ln 5, 0): 20; b_1 = (0, ln 2): 3
    biases = Array([[math.log(5), 0.0], [0.0, math.log(2)]])
    assert ratios(ZTW(2.0, NONE, NONE), row(4.0, 9.0)) == pytest.approx([4.0, 6.0], rel=1e-5)
    assert ratios(ZTW(2.0, NONE, biases), row(4.0, 9.0)) == pytest.approx([20.0, 3.0], rel=1e-5)


@pytest.mark.parametrize(
    ("cascade", "own"),
    [
        # exit 0 says .8, .2; exit 1's own logits are 0, 0, so z_1 = V log p_0 and p_1's ratio is
        ([[1.0, 0.0], [0.0, 1.0]], 0.8 / 0.2),  # (log .8, log .2)
        ([[0.0, 1.0], [1.0, 0.0]], 0.2 / 0.8),  # (log .2, log .8)
        ([[1.0, 0.0], [0.0, 0.0]], 0.8),  # (log .8, 0)
        ([[0.0, 1.0], [0.0, 0.0]], 0.2),  # (log .2, 0)
        ([[0.0, 0.0], [1.0, 0.0]], 1 / 0.8),  # (0, log .8)
        ([[2.0, -1.0], [0.0, 0.0]], 0.8**2 / 0.2),  # (2 log .8 - log .2, 0)
    ],
)
def test_the_cascade_maps_what_the_exit_before_said(cascade, own):
    policy = ZTW(2.0, NONE, NONE, Array([[[9.0, 9.0], [9.0, 9.0]], cascade]))  # V_0 is not used
    # E_1 = (4 * own)^(1/2)
    assert ratios(policy, row(4.0, 1.0)) == pytest.approx([4.0, math.sqrt(4.0 * own)], rel=1e-5)


def test_the_cascade_hands_on_what_it_was_handed():
    # V = 1: p_0 = 4; p_1 = 4 * 2 = 8; p_2 = 8 * 3 = 24 (not 2 * 3); the mean: (4 * 8)^(1/2), (4 * 8 * 24)^(1/3)
    one = Array(torch.eye(2).expand(3, 2, 2))
    policy = ZTW(2.0, Array(torch.zeros(3, 3)), Array(torch.zeros(3, 2)), one)
    assert ratios(policy, row(4.0, 2.0, 3.0)) == pytest.approx([4.0, 32**0.5, 768 ** (1 / 3)], rel=1e-5)


def test_exits_that_are_off_are_neither_in_the_mean_nor_in_the_cascade():
    weights = Array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [math.log(2), 50.0, 0.0]])
    nothing, flags, made = Array(torch.zeros(3, 2)), (True, False, True), row(4.0, 1000.0, 9.0)
    # of exits 0 and 2: (4^2 * 9)^(1/2) = 12
    assert ratios(ZTW(2.0, weights, nothing, None, flags), made) == pytest.approx([4.0, 12.0], rel=1e-5)
    # exit 2 sees exit 0: p_2 = 9 * 4 = 36, and (4^2 * 36)^(1/2) = 24
    one = Array(torch.eye(2).expand(3, 2, 2))
    assert ratios(ZTW(2.0, weights, nothing, one, flags), made) == pytest.approx([4.0, 24.0], rel=1e-5)


def test_three_classes():
    # p_0 = (1/2, 1/4, 1/4), p_1 = (1/8, 1/2, 3/8): products 1/16, 1/8, 3/32, roots .25, .353553, .306186: sum .909739
    made = ExitTrace(torch.tensor([[[0.5, 0.25, 0.25]], [[0.125, 0.5, 0.375]]]).log())
    answer = walk(ZTW(2.0, NONE, Array(torch.zeros(2, 3))), made).answer
    assert answer[1, 0].exp().tolist() == pytest.approx([0.274804, 0.388631, 0.336565], abs=2e-6)


def test_rows_leave_by_the_ensemble_and_get_its_answer():
    # exit 0: 9, p = .9; exit 1's own 1/3 says the second class, the ensemble (9/3)^(1/2) = 1.732 the first with .633975
    made = row(9.0, 1 / 3, 1.0)
    nothing = Array(torch.zeros(3, 3)), Array(torch.zeros(3, 2))
    assert [run(ZTW((t, 0.64, 0.0), *nothing), made).exit.item() for t in (0.89, 0.91)] == [0, 2]
    second = run(ZTW((0.91, 0.63, 0.0), *nothing), made)
    assert second.exit.item() == 1
    assert second.score.item() == pytest.approx(0.633975, abs=2e-6)
    assert second.answer.argmax().item() == 0
    assert second.answer[0].tolist() == pytest.approx([math.log(0.633975), math.log(0.366025)], abs=5e-6)
    # the last exit answers together too: (9 / 3 * 1)^(1/3) = 1.442250, p = .590542
    third = run(ZTW(2.0, *nothing), made)
    assert (third.exit.item(), third.answer.argmax().item()) == (2, 0)
    assert third.score.item() == pytest.approx(0.590542, abs=2e-6)
