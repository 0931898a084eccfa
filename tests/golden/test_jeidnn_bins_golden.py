"""JEI-DNN's gates and accuracy bins, worked by hand.

Entropies are in units of their largest value. Of two classes that is bits:

    p = .9, .1          entropy .468996, p^(1/2) = 3 : 1, entropy .811278
    p = .9, .1          p^2 = 81 : 1, 81/82 * .017702 + 1/82 * 6.357552 = .017486 + .077531 = .095017
    p = .64 .16 .16 .04 two independent halves of .8, .2: entropy .721928, margin .48
                        p^(1/2) = 4 : 2 : 2 : 1, two halves of 2/3, 1/3: entropy .918296
"""

import math

import pytest
import torch

from offramp.cost import CostModel
from offramp.policies import JEIDNN, AccuracyBins, Array
from offramp.policies.jeidnn import gate_features
from offramp.simulate import Outcome, simulate, walk
from offramp.trace import ExitTrace


def logits(*p: float) -> list[float]:
    return [math.log(v) for v in p]


def run(policy, made: ExitTrace) -> Outcome:
    return simulate(policy, made, CostModel.from_costs([k + 1.0 for k in range(made.exits)]))


SURE, EVEN = logits(0.9, 0.1), [0.0, 0.0]


def test_features():
    two = torch.tensor([SURE, EVEN])
    assert gate_features(two, 0.5).tolist() == [
        pytest.approx([0.9, 0.468996, 0.8, 0.811278], abs=2e-6),
        pytest.approx([0.5, 1.0, 0.0, 1.0], abs=2e-6),
    ]
    assert gate_features(two[:1], 2.0)[0].tolist() == pytest.approx([0.9, 0.468996, 0.8, 0.095017], abs=2e-6)
    four = torch.tensor([logits(0.16, 0.64, 0.04, 0.16)])
    assert gate_features(four, 0.5)[0].tolist() == pytest.approx([0.64, 0.721928, 0.48, 0.918296], abs=2e-6)


def test_gates():
    # 1 * .9 - 1 * .468996 + 2 * .8 + .5 * .811278 - .25 = 2.186643 and .5 - 1 + 0 + .5 - .25 = -.25
    # the second gate: -.9 + 3 = 2.1 and -.5 + 3 = 2.5, less 2.3: -.2 and .2
    gates = Array([[1.0, -1.0, 2.0, 0.5, -0.25], [-1.0, 0.0, 0.0, 0.0, 0.7], [0.0] * 5])
    made = ExitTrace(torch.tensor([[SURE, EVEN], [SURE, EVEN], [EVEN, EVEN]]))
    walked = walk(JEIDNN(gates), made)
    assert walked.score[0].tolist() == pytest.approx([2.186643, -0.25], abs=5e-6)
    assert walked.score[1].tolist() == pytest.approx([-0.2, 0.2], abs=2e-6)
    assert run(JEIDNN(gates), made).exit.tolist() == [0, 1]
    assert run(JEIDNN(gates, (3.0, -0.21, 0.0)), made).exit.tolist() == [1, 1]
    assert run(JEIDNN(gates, 0.0, 0.5, (False, True, True)), made).exit.tolist() == [2, 1]


def test_a_gate_opens_at_a_half():
    # the margin of two equal logits is exactly 0, and sigmoid(0) = 1/2 is enough
    equal = ExitTrace(torch.zeros(2, 1, 2))
    assert run(JEIDNN(Array([[0.0, 0.0, 1.0, 0.0, 0.0]] * 2)), equal).exit.tolist() == [0]
    assert run(JEIDNN(Array([[0.0, 0.0, 1.0, 0.0, -1e-6]] * 2)), equal).exit.tolist() == [1]


# confidences              .55   .7   .9   and at exit 1   .7   .55   .9
BINNED = torch.tensor([[logits(p, 1 - p) for p in line] for line in ((0.55, 0.7, 0.9), (0.7, 0.55, 0.9), (0.6,) * 3)])
EDGES = ((0.6, 0.8), (0.6,), ())
RIGHT = ((0.5, 0.7, 0.95), (0.65, 0.9), (0.8,))


def test_accuracies_of_bins():
    # exit 0: below .6 is .5, .6 to .8 is .7, from .8 on .95; exit 1: below .6 is .65, else .9; exit 2 has one bin
    scores = walk(AccuracyBins(EDGES, RIGHT, 1.0), ExitTrace(BINNED)).score
    assert scores[0].tolist() == pytest.approx([0.5, 0.7, 0.95])
    assert scores[1].tolist() == pytest.approx([0.9, 0.65, 0.9])
    assert scores[2].tolist() == pytest.approx([0.8] * 3)


@pytest.mark.parametrize(
    ("delta", "exits"),
    [
        (0.5, [0, 0, 0]),
        (0.6, [1, 0, 0]),
        (0.8, [1, 2, 0]),
        (0.92, [2, 2, 0]),
        (0.96, [2, 2, 2]),
        # asked for exactly what a bin has
        (0.95, [2, 2, 0]),
        (0.9, [1, 2, 0]),
        (0.7, [1, 0, 0]),
        ((0.96, 0.65, 0.0), [1, 1, 1]),
    ],
)
def test_rows_leave_where_their_bin_is_right_often_enough(delta, exits):
    assert run(AccuracyBins(EDGES, RIGHT, delta), ExitTrace(BINNED)).exit.tolist() == exits


def test_a_confidence_on_an_edge_is_in_the_bin_above():
    equal = ExitTrace(torch.zeros(2, 1, 2))  # the confidence is exactly 1/2
    assert walk(AccuracyBins(((0.5,),) * 2, ((0.25, 0.75),) * 2, 1.0), equal).score[:, 0].tolist() == [0.75, 0.75]
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    assert walk(AccuracyBins(((above,),) * 2, ((0.25, 0.75),) * 2, 1.0), equal).score[:, 0].tolist() == [0.25, 0.25]


def test_equal_edges_leave_a_bin_empty():
    policy = AccuracyBins(((0.6, 0.6), ()), ((0.25, 0.5, 0.75), (1.0,)), 1.0)
    made = ExitTrace(torch.tensor([[logits(0.55, 0.45), SURE], [SURE, SURE]]))
    assert walk(policy, made).score[0].tolist() == [0.25, 0.75]
