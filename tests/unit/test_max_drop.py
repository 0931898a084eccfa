"""Metrics as scikit-learn counts them, and the cheapest policy that keeps one."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.calibrate import Calibration, MaxDrop, calibrate
from offramp.choices import calibrator_of
from offramp.compare import CHOICES, calibrate_choice, compare, compare_pooled, halves
from offramp.cost import CostModel
from offramp.errors import DataError, ValueRangeError
from offramp.metrics import METRICS, class_scores, metric_interval, metric_of
from offramp.policies import MaxProb
from offramp.simulate import simulate
from offramp.trace import ExitTrace

COSTS = CostModel.from_costs((0.25, 0.5, 0.75, 1.0))


def trace(rows: int = 400, seed: int = 0, classes: int = 3) -> ExitTrace:
    """Later exits know more; class 2 is rare."""
    dice = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), rows, replacement=True, generator=dice)
    hint = torch.nn.functional.one_hot(labels, classes).float()
    noise = torch.randn(4, rows, classes, generator=dice)
    return ExitTrace(torch.stack([hint * (1.0 + k) + noise[k] for k in range(4)]), labels)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(1, 40), st.integers(0, 10**6))
def test_metrics_are_those_of_scikit_learn(classes: int, rows: int, seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    dice = torch.Generator().manual_seed(seed)
    said, truth = (torch.randint(classes, (rows,), generator=dice) for _ in range(2))
    theirs = {
        "accuracy": sklearn.accuracy_score(truth, said),
        "macro-f1": sklearn.f1_score(truth, said, average="macro", zero_division=0),
        "balanced-accuracy": sklearn.recall_score(
            truth, said, average="macro", labels=truth.unique().tolist(), zero_division=0
        ),
        "f1": sklearn.f1_score(truth, said, labels=[classes - 1], average="macro", zero_division=0),
        "matthews": sklearn.matthews_corrcoef(truth, said),
    }
    for name in METRICS:
        assert metric_of(name, said, truth, classes) == pytest.approx(theirs[name], abs=1e-12)
        low, high = metric_interval(name, said, truth, classes, draws=50)
        assert (-1 if name == "matthews" else 0) <= low <= high <= 1 + 1e-12
    parts = sklearn.precision_recall_fscore_support(truth, said, labels=range(classes), zero_division=0)
    ours = class_scores(said, truth, classes)
    for mine, theirs_ in zip((ours.precision, ours.recall, ours.f1, ours.rows), parts, strict=True):
        assert mine.tolist() == pytest.approx(list(theirs_), abs=1e-12)


@pytest.mark.parametrize("family", [name for name in CHOICES if name != "berxit"])
@pytest.mark.parametrize("metric", METRICS)
def test_the_metric_is_kept_and_the_cost_is_lower(family: str, metric: str) -> None:
    rows = trace()
    target = MaxDrop(0.02, metric)
    found = calibrate_choice(family, rows, COSTS, target)
    outcome = simulate(found.policy, rows, COSTS)
    labels = rows.known_labels("this")
    plain = metric_of(metric, rows.logits[-1].argmax(-1), labels, 3)
    assert metric_of(metric, outcome.answer.argmax(-1), labels, 3) >= plain - 0.02 - 1e-9
    assert found.achieved == pytest.approx(outcome.cost)
    assert found.status in ("met", "best_effort")
    assert found.status == "best_effort" or outcome.cost < 1.0
    assert "on others it may lose more" in found.message or found.status == "best_effort"


def test_a_smaller_drop_costs_more_and_nothing_cheaper_was_missed_on_the_grid() -> None:
    rows = trace()
    costs = [calibrate(MaxProb, rows, COSTS, MaxDrop(drop)).achieved for drop in (0.2, 0.05, 0.0)]
    assert costs == sorted(costs)
    found = calibrate(MaxProb, rows, COSTS, MaxDrop(0.02))
    labels = rows.known_labels("this")
    plain = float((rows.logits[-1].argmax(-1) == labels).double().mean())
    for threshold in torch.linspace(0.34, 0.999, 400).tolist():
        outcome = simulate(MaxProb((threshold,) * 4), rows, COSTS)
        if outcome.accuracy is not None and outcome.accuracy >= plain - 0.02:
            # the search steps by 1/320 of the range, so that is how much cheaper a policy that it missed may be
            assert outcome.cost >= found.achieved - 0.75 / 40
            break


def test_what_cannot_be_asked() -> None:
    for drop in (-0.1, 1.5, float("nan"), True):
        with pytest.raises(ValueRangeError, match="the drop is"):
            MaxDrop(drop)
    with pytest.raises(ValueRangeError, match="expected one of accuracy"):
        MaxDrop(0.1, "f2")
    with pytest.raises(DataError, match="needs labels"):
        calibrate(MaxProb, ExitTrace(torch.randn(4, 9, 3)), COSTS, MaxDrop(0.1))


def test_saved_and_read(tmp_path: Path) -> None:
    found = calibrate(MaxProb, trace(), COSTS, MaxDrop(0.01, "macro-f1"))
    assert Calibration.load(found.save(tmp_path / "p.json")) == found
    assert str(found.target) == "macro-f1 down by at most 1 points"


def test_where_only_the_last_exit_knows_every_row_runs_to_the_end() -> None:
    rows = trace()
    blind = rows.logits.clone()
    blind[:-1] = torch.tensor([0.0, 0.0, 9.0])
    found = calibrate(MaxProb, ExitTrace(blind, rows.labels), COSTS, MaxDrop(0.01))
    assert found.status == "best_effort"
    assert simulate(found.policy, rows, COSTS).shares == (0, 0, 0, 1)


def test_comparisons_show_another_metric_beside_accuracy() -> None:
    fit, test = trace(), trace(seed=1)
    (row,) = compare(fit, test, COSTS, [MaxDrop(0.02, "macro-f1")], ["max-prob"], metric="macro-f1")
    outcome = simulate(row.policy, test, COSTS)
    assert row.metric == "macro-f1"
    assert row.value == metric_of("macro-f1", outcome.answer.argmax(-1), test.known_labels("this"), 3)
    assert row.value_low < row.value < row.value_high
    assert row.accuracy == outcome.accuracy
    (pooled,) = compare_pooled(halves(fit, 2), fit.rows, COSTS, MaxDrop(0.02), ["max-prob"], metric="macro-f1")
    assert pooled.value_low < pooled.value < pooled.value_high
    assert pooled.value != pooled.accuracy


def test_a_budget_that_several_targets_try_is_fitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, fitted = trace(), list[float]()
    calibrator = calibrator_of("eenet", rows, COSTS)
    ladder, at = type(calibrator.ladder), type(calibrator.ladder).at

    def counted(self, spend_of):
        fitted.append(spend_of((True,) * 4).amount)
        return at(self, spend_of)

    monkeypatch.setattr(ladder, "at", counted)
    calibrator.to(MaxDrop(0.02), None)
    once = len(fitted)
    calibrator.to(MaxDrop(0.02, "macro-f1"), None)
    assert once > 1
    assert len(fitted) == len(set(fitted)) < 2 * once
