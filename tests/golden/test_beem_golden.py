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


def released_bert_path(row, patience: int, scale: float) -> tuple[int, float]:
    """(exit, score there) as the released code for BERT has it: w_i = scale (i - 1), and the count decides."""
    before, count, score = None, 0, 0.0
    for k, (label, confidence) in enumerate(row):
        if label == before:
            count, score = count + 1, score + scale * k * confidence
        else:
            count, score = 0, 0.0
        if count >= patience:
            return k, score
        before = label
    return len(row) - 1, score


def test_the_score_of_the_bert_path_is_dead():
    """Labels 0 0 1 1 1 1 count 0 1 0 1 2 3. With w = 0, .1, .2, ... patience 2 leaves at exit 4 with a score of

    .3 c + .4 c = .63 for c = .9 and .42 for c = .6: the count alone decides, as in PABEE. BEEM's own rule with the same
    weights and the threshold .5 tells the two apart: .63 leaves at exit 4, .42 goes on to .42 + .5 * .6 = .72.
    """
    rows = [[(label, c) for label in (0, 0, 1, 1, 1, 1)] for c in (0.9, 0.6)]
    assert [released_bert_path(r, 2, 0.1)[0] for r in rows] == [4, 4]
    assert [released_bert_path(r, 2, 0.1)[1] for r in rows] == pytest.approx([0.63, 0.42])
    made = [row(*r) for r in rows]
    assert exits(Patience(2), *made) == [4, 4]
    assert exits(BEEM(tuple(0.1 * k for k in range(6)), 0.5, reset="zero"), *made) == [4, 5]
    # on any rows, whatever the weights
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (300, 6), generator=g).tolist()
    confidences = (0.51 + 0.48 * torch.rand(300, 6, generator=g)).tolist()
    rows = [list(zip(a, b, strict=True)) for a, b in zip(labels, confidences, strict=True)]
    for patience in (1, 2, 3):
        expected = exits(Patience(patience), *[row(*r) for r in rows])
        assert len(set(expected)) > 2
        for scale in (0.0, 0.1, 50.0):
            assert [released_bert_path(r, patience, scale)[0] for r in rows] == expected


def test_quirk_of_regression_the_count_of_agreements_decides():
    """0, 1, 1.25, 1.5, 5 with tau 1/2 moves by 1, 1/4, 1/4, 3.5 and counts 0 0 1 2 0; 1/2 itself is no agreement."""
    ones, flags = (1.0,) * 5, (True, False, True, True, True)
    made = ExitTrace(torch.tensor([[0.0, 1.0, 1.25, 1.5, 5.0], [0.0, 0.5, 1.0, 0.75, 0.75]]).T[:, :, None])
    costs = CostModel.from_costs((1, 2, 3, 4, 5))
    score = walk(BEEM(ones, 99.0, "zero", None, "regression", 0.5), made).score.T.tolist()
    assert score == [[0, 0, 1, 2, 0], [0, 0, 0, 1, 2]]
    assert walk(Patience(99, None, "regression", 0.5), made).score.T.tolist() == score
    for count, expected in ((0, [0, 0]), (1, [2, 3]), (2, [3, 4]), (3, [4, 4])):
        by_score = simulate(BEEM(ones, float(count), "zero", None, "regression", 0.5), made, costs)
        by_count = simulate(Patience(count, None, "regression", 0.5), made, costs)
        assert by_score.exit.tolist() == by_count.exit.tolist() == expected
    # own weights: each exit brings its weight, 1 2 (2 + 3) (5 + 4) 5
    weights = (1.0, 2.0, 3.0, 4.0, 5.0)
    walked = walk(BEEM(weights, 99.0, "own", None, "regression", 0.5), made)
    assert walked.score[:, 0].tolist() == [1, 2, 5, 9, 5]
    # without exit 1: 0 1.25 1.5 5 counts 0 0 1 0
    assert walk(Patience(99, flags, "regression", 0.5), made).score[:, 0].tolist() == [0, 0, 1, 0]


def test_sets_of_labels_agree_as_a_whole():
    # logits of (.9, .2), (.8, .4), (.8, .6), (.9, .9): sets {0} {0} {0 1} {0 1}, so counts 0 1 0 1
    # certainties: (.9 + .8)/2 = .85, (.8 + .6)/2 = .7, (.8 + .6)/2 = .7, .9; own: .85, 1.55, .7, 1.6
    pairs = ((0.9, 0.2), (0.8, 0.4), (0.8, 0.6), (0.9, 0.9))
    made = ExitTrace(torch.tensor([[[math.log(p / (1 - p)) for p in pair]] for pair in pairs]))
    assert walk(Patience(9, None, "multilabel"), made).score[:, 0].tolist() == [0, 1, 0, 1]
    assert scores(BEEM((1.0,) * 4, 99.0, "own", None, "multilabel"), made) == [0.85, 1.55, 0.7, 1.6]
    assert scores(BEEM((1.0,) * 4, 99.0, "zero", None, "multilabel"), made) == [0.0, 0.7, 0.0, 0.9]
    # by the most probable class alone all four would agree
    assert walk(Patience(9), made).score[:3, 0].tolist() == [0, 1, 2]


def test_every_row_decides_for_itself():
    # the released code asks whether all rows of the batch may leave; here each row leaves alone
    sure, unsure = row((0, 0.9), (0, 0.9), (0, 0.9)), row((0, 0.6), (1, 0.6), (0, 0.6))
    assert exits(BEEM((1.0,) * 3, 0.8), sure, unsure, sure) == [0, 2, 0]
    assert exits(BEEM((1.0,) * 3, 0.8), unsure) == [2]
    assert exits(BEEM((1.0,) * 3, 0.8), sure) == [0]
