"""BEEM, worked by hand from arXiv 2502.00745 and from the quirks of the authors' code.

Logits are chosen so that the winner of two classes has a probability written in the table:
log(c / (1 - c)) against 0.
"""

import math

import pytest
import torch

from offramp.calibrate import beem_weights
from offramp.cost import CostModel
from offramp.policies import BEEM, Patience
from offramp.simulate import simulate, walk
from offramp.trace import ExitTrace


def row(*said: tuple[int, float]) -> list[list[float]]:
    """One row's logits [exit cls] from (label, confidence) per exit."""
    logits = []
    for label, confidence in said:
        winner = math.log(confidence / (1 - confidence))
        logits.append([winner, 0.0] if label == 0 else [0.0, winner])
    return logits


def trace(*rows) -> ExitTrace:
    return ExitTrace(torch.tensor(rows).transpose(0, 1), labels=torch.zeros(len(rows), dtype=torch.int64))


def exits(policy, *rows) -> list[int]:
    made = trace(*rows)
    return simulate(policy, made, CostModel.from_costs([k + 1.0 for k in range(made.exits)])).exit.tolist()


def scores(policy, made) -> list[float]:
    return [round(v, 5) for v in walk(policy, made).score[:, 0].tolist()]


TWELVE = tuple(0.1 * (k + 1) for k in range(12))  # figure 1: 0.1, 0.2, ..., 1.2


def test_weights_of_figure_1():
    made = trace(row(*[(0, 0.9)] * 12))
    assert beem_weights(made, "cost") == pytest.approx(TWELVE)
    assert beem_weights(made, "accuracy") == (1.0,) * 12


def test_figure_1_with_threshold_a_fifth():
    policy = BEEM(TWELVE, 0.2)
    # 0.1*0.9 = 0.09; agrees: + 0.2*0.9 = 0.27 >= 0.2 at exit 1
    # 0.1*0.9 = 0.09; disagrees: own 0.2*0.6 = 0.12; disagrees: own 0.3*0.7 = 0.21 at exit 2
    # 0.1*0.6 = 0.06; disagrees: own 0.2*0.6 = 0.12; agrees: + 0.3*0.6 = 0.30 at exit 2
    rest = [(0, 0.9)] * 9
    assert exits(
        policy,
        row((0, 0.9), (0, 0.9), (0, 0.9), *rest),
        row((0, 0.9), (1, 0.6), (0, 0.7), *rest),
        row((0, 0.6), (1, 0.6), (1, 0.6), *rest),
    ) == [1, 2, 2]


def test_sums_add_up_and_fall_back_to_own_or_zero():
    made = trace(row((0, 0.9), (0, 0.8), (1, 0.6), (1, 0.7)))
    weights = (0.5, 1.0, 1.5, 2.0)
    # own:  .5*.9 = .45   +1*.8 = 1.25   own 1.5*.6 = .9   +2*.7 = 2.3
    assert scores(BEEM(weights, 99.0), made) == [0.45, 1.25, 0.9, 2.3]
    # zero: 0             +1*.8 = .8     0                 +2*.7 = 1.4
    assert scores(BEEM(weights, 99.0, reset="zero"), made) == [0.0, 0.8, 0.0, 1.4]


def test_agreement_is_with_the_neighbour_not_with_the_majority():
    # labels 0 0 1 0: the last 0 disagrees with its neighbour 1, so it starts anew: .9
    made = trace(row((0, 0.9), (0, 0.9), (1, 0.9), (0, 0.9)))
    assert scores(BEEM((1.0,) * 4, 99.0), made) == [0.9, 1.8, 0.9, 0.9]


def test_the_first_exit_agrees_with_nothing_even_with_class_0():
    # were the label before the first exit 0 rather than none, "zero" would give .9 at once
    assert scores(BEEM((1.0, 1.0), 99.0, reset="zero"), trace(row((0, 0.9), (0, 0.9)))) == [0.0, 0.9]
    assert exits(BEEM((1.0, 1.0), 0.9 - 1e-6), row((0, 0.9), (0, 0.9))) == [0]


def test_exactly_at_the_threshold_leaves():
    # two equal logits: the confidence is exactly 0.5, the weight 1, the score 0.5
    equal = [[0.0, 0.0], [0.0, 0.0]]
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    assert exits(BEEM((1.0, 1.0), 0.5), equal) == [0]
    assert exits(BEEM((1.0, 1.0), above), equal) == [1]


def test_per_exit_thresholds_and_a_switched_off_exit():
    nine = row(*[(0, 0.9)] * 4)
    assert exits(BEEM((1.0,) * 4, (1.0, 2.0, 2.5, 0.0)), nine) == [2]  # .9, 1.8, 2.7 >= 2.5
    # exit 1 off: .9, then .9 + .9 = 1.8 at exit 2, which is below 2.5
    assert exits(BEEM((1.0,) * 4, (1.0, 0.0, 2.5, 0.0), enabled=(True, False, True, True)), nine) == [3]


def test_quirk_of_the_albert_path():
    """w = 0.4 k from 0, reset to zero, threshold 1.5: with full confidence and agreement 0, .4, 1.2, 2.4."""
    policy = BEEM(tuple(0.4 * k for k in range(12)), 1.5, reset="zero")
    sure = row(*[(0, 1 - 1e-7)] * 12)
    # .9: 0, .36, 1.08, 2.16 at exit 3;  .6: 0, .24, .72, 1.44 (below), 2.4 at exit 4
    # a turn at exit 2 clears: 0, .36, 0, 1.2*.9 = 1.08, + 1.6*.9 = 2.52 at exit 4
    assert exits(
        policy,
        sure,
        row(*[(0, 0.9)] * 12),
        row(*[(0, 0.6)] * 12),
        row((0, 0.9), (0, 0.9), *[(1, 0.9)] * 10),
    ) == [3, 3, 4, 4]
    assert scores(policy, trace(sure))[:4] == pytest.approx([0.0, 0.4, 1.2, 2.4], abs=1e-4)


def test_quirk_of_the_bert_path_is_patience():
    """It leaves on the count of agreements; with weights 1 and full confidence, reset "zero" counts them."""
    labels = torch.randint(2, (6, 200), generator=torch.Generator().manual_seed(0))
    made = ExitTrace(200.0 * torch.nn.functional.one_hot(labels, 2).float())
    costs = CostModel.from_costs((1, 2, 3, 4, 5, 6))
    for patience in (1, 2, 3):
        count = simulate(Patience(patience), made, costs)
        score = simulate(BEEM((1.0,) * 6, float(patience), reset="zero"), made, costs)
        assert torch.equal(count.exit, score.exit)
        assert len(count.exit.unique()) > 2


def test_every_row_decides_for_itself():
    # the released code asks whether all rows of the batch may leave; here each row leaves alone
    sure, unsure = row((0, 0.9), (0, 0.9), (0, 0.9)), row((0, 0.6), (1, 0.6), (0, 0.6))
    assert exits(BEEM((1.0,) * 3, 0.8), sure, unsure, sure) == [0, 2, 0]
    assert exits(BEEM((1.0,) * 3, 0.8), unsure) == [2]
    assert exits(BEEM((1.0,) * 3, 0.8), sure) == [0]
