"""PABEE's patience, worked by hand."""

import pytest
import torch

from offramp.cost import CostModel
from offramp.policies import Patience
from offramp.simulate import simulate, walk
from offramp.trace import ExitTrace


def said(*labels: str) -> ExitTrace:
    """A trace of rows such as "00110", one digit per exit."""
    index = torch.tensor([[int(c) for c in row] for row in labels]).T
    return ExitTrace(5.0 * torch.nn.functional.one_hot(index, 3).float())


@pytest.mark.parametrize(
    ("patience", "exits"),
    [
        # rows:  0000   0110   0120   1122   2200   m counts agreements in a row, and is 0 at exit 0
        # m      0123   0010   0000   0101   0101
        (0, [0, 0, 0, 0, 0]),
        (1, [1, 2, 3, 1, 1]),
        (2, [2, 3, 3, 3, 3]),
        (3, [3, 3, 3, 3, 3]),
        (9, [3, 3, 3, 3, 3]),
    ],
)
def test_table(patience, exits):
    made = said("0000", "0110", "0120", "1122", "2200")
    assert simulate(Patience(patience), made, CostModel.from_costs((1, 2, 3, 4))).exit.tolist() == exits


def test_counts_and_reset():
    # 0 0 0 1 1 1 1: 0 1 2 0 1 2 3
    assert walk(Patience(99), said("0001111")).score[:, 0].tolist() == [0, 1, 2, 0, 1, 2, 3]


def test_at_least_not_exactly():
    """With `==` a row whose count is already beyond the threshold would run to the end."""
    seen = walk(Patience(1), said("0000"))
    assert seen.stop[:, 0].tolist() == [False, True, True, True]


def test_neighbours_skip_a_switched_off_exit():
    # 0 1 0 0 with exit 1 off: visited 0 0 0, m = 0 1 2, so patience 2 leaves at the last exit and 1 at exit 2
    flags = (True, False, True, True)
    costs = CostModel.from_costs((1, 2, 3, 4))
    assert simulate(Patience(1, flags), said("0100"), costs).exit.tolist() == [2]
    assert simulate(Patience(2, flags), said("0100"), costs).exit.tolist() == [3]


def test_one_row_does_not_wait_for_another():
    assert walk(Patience(1), said("000", "012")).stop[1].tolist() == [True, False]
