"""Bounds, regret, overthinking and failure prediction, against other libraries and by hand."""

from itertools import pairwise

import pytest
import torch
from sklearn.metrics import roc_auc_score

from offramp import Budget, CostModel, ExitTrace, MaxProb
from offramp.compare import area, compare, score_quality
from offramp.quality import auroc, ece, eefp, exit_quality, oracle_accuracy, overthinking, random_accuracy

COSTS = CostModel.from_costs((0.25, 0.5, 1.0))


def trace_of(right: list[list[int]]) -> ExitTrace:
    """Two classes, label 0; `right[k][row]` says whether exit k has the row right."""
    flags = torch.tensor(right, dtype=torch.float32)
    return ExitTrace(
        torch.stack([4 * flags - 2, 2 - 4 * flags], dim=-1), torch.zeros(flags.shape[1], dtype=torch.int64)
    )


def test_auroc_by_hand():
    right = torch.tensor([True, True, False, False])
    assert auroc(torch.tensor([4.0, 3.0, 2.0, 1.0]), right) == 1
    assert auroc(torch.tensor([4.0, 2.0, 2.0, 1.0]), right) == 0.875
    assert auroc(torch.ones(4), right) == 0.5
    assert auroc(torch.ones(2), torch.ones(2, dtype=torch.bool)) is None


def test_auroc_is_that_of_scikit_learn_with_ties():
    g = torch.Generator().manual_seed(0)
    score, positive = torch.randint(7, (400,), generator=g) / 7, torch.rand(400, generator=g) > 0.4
    assert auroc(score, positive) == pytest.approx(roc_auc_score(positive.numpy(), score.numpy()))
    assert auroc(score, torch.ones(400, dtype=torch.bool)) is None
    assert auroc(torch.ones(4), torch.tensor([True, True, False, False])) == 0.5


def test_ece_by_hand():
    """One bin holds 0.61 and 0.65, one of them right: |1.26 - 1| / 3; the other 0.95, right: 0.05 / 3."""
    found = ece(torch.tensor([0.61, 0.65, 0.95]), torch.tensor([True, False, True]))
    assert found == pytest.approx((0.26 + 0.05) / 3, abs=1e-6)


def test_failure_prediction_counts_rows_that_nothing_helps_as_good_to_stop():
    """Row 2 is wrong everywhere: stopping loses nothing. Row 1 is right later: it alone should score low."""
    right = torch.tensor([[True, False, False], [True, True, False]])
    assert eefp(torch.tensor([0.9, 0.2, 0.5]), right, 0) == 1.0
    assert eefp(torch.tensor([0.1, 0.2, 0.5]), right, 0) == 0.5


def test_overthinking_and_exits_alone():
    trace = trace_of([[1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]])
    assert overthinking(trace) == 0.25
    first, second, last = exit_quality(trace)
    assert (first.accuracy, second.accuracy, last.accuracy) == (0.5, 0.5, 0.5)
    assert (first.overthinking, second.overthinking, last.overthinking) == (0.25, 0.0, 0.0)
    assert last.eefp is None


def test_the_oracle_pays_for_the_cheapest_first():
    trace = trace_of([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    # all at exit 0 costs 0.25; row 1 costs 0.25 more, row 2 0.75 more; in four rows' mean 0.0625 and 0.1875
    assert [oracle_accuracy(trace, COSTS, b) for b in (0.25, 0.31, 0.3125, 0.49, 0.5, 1.0)] == [
        0.25, 0.25, 0.5, 0.5, 0.75, 0.75,
    ]  # fmt: skip


def test_random_with_the_same_shares_is_the_mean_of_draws():
    g = torch.Generator().manual_seed(1)
    trace = ExitTrace(torch.randn(3, 500, 3, generator=g), torch.randint(3, (500,), generator=g))
    shares = (0.5, 0.3, 0.2)
    right = (trace.logits.argmax(-1) == trace.labels).double()
    draws = torch.multinomial(torch.tensor(shares), 500 * 400, replacement=True, generator=g).view(400, 500)
    assert random_accuracy(trace, shares) == pytest.approx(float(right.gather(0, draws).mean()), abs=4e-3)


def test_area_regret_and_the_quality_of_a_score():
    g = torch.Generator().manual_seed(2)
    labels = torch.randint(3, (3000,), generator=g)
    depth = torch.tensor([0.8, 1.5, 2.5])[:, None, None]
    trace = ExitTrace(depth * torch.nn.functional.one_hot(labels, 3) + torch.randn(3, 3000, 3, generator=g), labels)
    fit, test = trace.split((0.5, 0.5))
    rows = compare(fit, test, COSTS, [Budget(fraction=f) for f in (0.4, 0.6, 0.8)], ["max-prob", "fixed", "patience"])
    by = {name: [row for row in rows if row.family == name] for name in ("max-prob", "fixed", "patience")}
    points = [(row.cost, row.accuracy) for row in by["max-prob"]]
    by_hand = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))
    assert area(by["max-prob"]) == pytest.approx(by_hand / (points[-1][0] - points[0][0]))
    assert area(by["max-prob"][:1]) is None
    for row in rows:
        assert row.regret >= 0
        assert row.difference_low <= row.difference <= row.difference_high
    assert by["max-prob"][0].difference == 0
    assert by["max-prob"][1].accuracy > by["max-prob"][1].random + 0.02
    assert by["fixed"][1].accuracy == pytest.approx(by["fixed"][1].random)
    assert score_quality(MaxProb(0.5), test) > 0.7
