"""PCEE's count of confident exits and the votes of neighbours, worked by hand."""

import math

import pytest
import torch

from offramp.cost import CostModel
from offramp.policies import PCEE, Entropy, Voting
from offramp.simulate import simulate, walk
from offramp.trace import ExitTrace


def exits(policy, made: ExitTrace) -> list[int]:
    return simulate(policy, made, CostModel.from_costs([k + 1.0 for k in range(made.exits)])).exit.tolist()


def sure(*rows) -> ExitTrace:
    """Rows of two classes, from the first class's probability at every exit."""
    return ExitTrace(torch.tensor([[[math.log(v / (1 - v)), 0.0] for v in row] for row in rows]).transpose(0, 1))


def said(*rows: str) -> ExitTrace:
    """Rows such as "0010", one label per exit."""
    index = torch.tensor([[int(c) for c in row] for row in rows]).T
    return ExitTrace(3.0 * torch.nn.functional.one_hot(index, 3).float())


@pytest.mark.parametrize(
    ("tau", "counts", "left"),
    [
        # p                3/4      .9     1/2    .9      .9
        # bits            .811278  .468996  1    .468996 .468996
        # 1 - bits        .188722  .531004  0    .531004 .531004     exits for patience 1, 2, 3
        (0.15, [1, 2, 0, 1, 2], [0, 1, 4]),
        (0.5, [0, 1, 0, 1, 2], [1, 4, 4]),
        (0.6, [0, 0, 0, 0, 0], [4, 4, 4]),
        (-0.1, [1, 2, 3, 4, 5], [0, 1, 2]),
    ],
)
def test_pcee_counts_confident_exits_in_a_row(tau, counts, left):
    made = sure((0.75, 0.9, 0.5, 0.9, 0.9))
    assert walk(PCEE(tau, 99), made).score[:, 0].tolist() == counts
    assert [exits(PCEE(tau, patience), made)[0] for patience in (1, 2, 3)] == left


def test_pcee_does_not_ask_for_the_same_label():
    assert walk(PCEE(0.5, 99), sure((0.9, 0.1, 0.9))).score[:, 0].tolist() == [1, 2, 3]


def test_pcee_with_patience_1_is_entropy():
    made = sure((0.75, 0.9, 0.5), (0.5, 0.75, 0.9), (0.9, 0.5, 0.5), (0.5, 0.5, 0.9))
    assert exits(PCEE(0.15), made) == exits(Entropy(0.15), made) == [0, 1, 0, 2]


def test_pcee_over_the_exits_that_are_on():
    made = sure((0.9, 0.5, 0.9, 0.9))
    assert exits(PCEE(0.5, 2), made) == [3]
    assert exits(PCEE(0.5, 2, (True, False, True, True)), made) == [2]


def test_pcee_counts_a_score_exactly_at_tau():
    certain = ExitTrace(torch.tensor([[[99.0, 0.0]]] * 3))  # 1 - bits is exactly 1
    assert exits(PCEE(1.0, 2), certain) == [1]
    assert exits(PCEE(1.0 + 1e-6, 2), certain) == [2]


@pytest.mark.parametrize(
    ("power", "row", "scores"),
    [
        # most equal votes  0010: 2 2 3     0120: 1 1 2     0110: 1 2 2     of 2, 3, 4
        (1.0, "0010", [2 / 2, 2 / 3, 3 / 4]),
        (1.0, "0120", [1 / 2, 1 / 3, 2 / 4]),
        (1.0, "0110", [1 / 2, 2 / 3, 2 / 4]),
        # over their square roots 1.414214, 1.732051, 2
        (0.5, "0010", [1.414214, 1.154701, 1.5]),
        (0.5, "0110", [0.707107, 1.154701, 1.0]),
        # over nothing
        (0.0, "0010", [2, 2, 3]),
    ],
)
def test_votes(power, row, scores):
    assert walk(Voting(9.0, power), said(row)).score[1:, 0].tolist() == pytest.approx(scores, abs=2e-6)


def test_where_votes_leave():
    made = said("0010", "0120", "0110", "0000")
    assert exits(Voting(0.7), made) == [1, 3, 3, 1]
    assert exits(Voting(0.6), made) == [1, 3, 2, 1]
    assert exits(Voting(0.5), made) == [1, 1, 1, 1]  # 1/2 is at the threshold
    assert exits(Voting(2.0, 0.0), made) == [1, 3, 2, 1]  # two equal votes, however many there are
    assert exits(Voting(1.5, 0.5), made) == [3, 3, 3, 2]  # 3 / sqrt 3 = 1.73 for three zeros
    assert exits(Voting((9.0, 1.1, 0.65, 0.0)), made) == [2, 3, 2, 2]


def test_the_answer_is_the_leaving_exits_own_and_not_the_majoritys():
    outcome = simulate(Voting(0.7), said("0001"), CostModel.from_costs((1, 2, 3, 4)))
    assert outcome.exit.item() == 1
    late = simulate(Voting((9.0, 9.0, 0.6, 0.0)), said("0012"), CostModel.from_costs((1, 2, 3, 4)))
    assert (late.exit.item(), late.answer.argmax().item()) == (2, 1)  # 0 0 1: 2/3, and exit 2 says 1


def test_the_first_visited_exit_never_fires():
    made = said("0000")
    assert exits(Voting(0.1), made) == [1]
    assert exits(Voting(-5.0), made) == [1]
    assert exits(Voting(0.1, 1.0, (False, True, True, True)), made) == [2]


def test_exits_that_are_off_have_no_vote():
    # 0 1 0 0 without exit 1: two equal votes of two at exit 2
    assert exits(Voting(0.9), said("0100")) == [3]
    assert exits(Voting(0.9, 1.0, (True, False, True, True)), said("0100")) == [2]
