"""From traces, costs, calibrations and timings to a report."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from offramp.compare import Compared
from offramp.cost import CostModel
from offramp.machine import versions
from offramp.metrics import accuracy_interval, class_scores, metric_interval, metric_of
from offramp.policies import Policy
from offramp.report.value import Example, ExitFacts, Measured, Part, Point, Report, Shown
from offramp.simulate import simulate
from offramp.timing import Speed
from offramp.trace import ExitTrace

__all__ = ["build_report", "exit_facts", "pick_examples", "shown_of"]

BINS = 15


def build_report(
    test: ExitTrace,
    costs: CostModel,
    *,
    title: str,
    curve: Sequence[Compared] = (),
    policies: Sequence[Shown] = (),
    speeds: Sequence[Speed] = (),
    unused: Sequence[Speed] = (),
    labels: Sequence[str] = (),
    taps: Sequence[str] = (),
    metric: str = "accuracy",
    examples: Sequence[Example] = (),
    parts: Sequence[Part] = (),
    notes: Sequence[str] = (),
    command: str = "",
) -> Report:
    """The report of a model with exits.

    Args:
        test: rows that neither training nor calibration saw, with labels.
        costs: of the same model.
        curve: what `compare` gave over budgets; with the same metric.
        policies: what `shown_of` gave.
        speeds: live runs, whose `policy` is the name of one of `policies`.
        unused: live runs where every exit is visited and none taken.
        labels: names of the classes; numbers without them.
        taps: modules that the exits are behind.
        metric: one of `offramp.metrics.METRICS`.
        title, examples, parts, notes, command: see `Report`.

    Raises:
        DataError: the test rows have no labels.
    """
    truth = test.known_labels("a report")
    said = test.logits[-1].argmax(-1)
    plain = metric_of(metric, said, truth, test.classes)
    live: dict[str, list[Measured]] = {}
    for speed in speeds:
        live.setdefault(speed.policy, []).append(_measured(speed))
    warned = [f"{row.family} at {row.target}: {row.warning}" for row in curve if row.warning]
    return Report(
        title=title,
        labels=tuple(labels) or tuple(map(str, range(test.classes))),
        metric=metric,
        plain=(plain, *metric_interval(metric, said, truth, test.classes)),
        exits=exit_facts(test, costs, taps),
        curve=tuple(
            Point(r.family, r.target, r.status, r.cost, r.value, r.value_low, r.value_high, r.shares) for r in curve
        ),
        policies=tuple(replace(policy, live=tuple(live.get(policy.name, ()))) for policy in policies),
        unused=tuple(map(_measured, unused)),
        classes=_classes(test),
        examples=tuple(examples),
        parts=tuple(parts),
        machine=costs.machine,
        versions=versions(),
        notes=(*notes, *warned),
        command=command,
    )


def shown_of(
    name: str, family: str, policy: Policy, test: ExitTrace, costs: CostModel, *, metric: str = "accuracy",
    message: str = "", fitted_rows: int = 0,
) -> Shown:  # fmt: skip
    """A policy as the report shows it, on test rows that it was not calibrated on.

    Raises:
        DataError: the test rows have no labels.
        ValueRangeError: the metric is unknown.
    """
    truth = test.known_labels("a report")
    outcome = simulate(policy, test, costs)
    said = outcome.answer.argmax(-1)
    low, high = metric_interval(metric, said, truth, test.classes)
    value = metric_of(metric, said, truth, test.classes)
    return Shown(name, family, message, fitted_rows, outcome.cost, value, low, high, outcome.shares)


def exit_facts(trace: ExitTrace, costs: CostModel, taps: Sequence[str] = ()) -> tuple[ExitFacts, ...]:
    """Each exit alone on the rows of a trace: cost, accuracy, and how well its confidence is calibrated.

    Source: expected calibration error with 15 equal bins, Guo et al. 2017, section 2.
    """
    truth = trace.known_labels("a report")
    names = (*taps, *(f"exit {k}" for k in range(len(taps), trace.exits - 1)), "the model's own output")
    facts = []
    for k in range(trace.exits):
        only = (*(j == k for j in range(trace.exits - 1)), True)
        top, said = trace.logits[k].softmax(-1).max(-1)
        right = (said == truth).double()
        low, high = accuracy_interval(int(right.sum()), trace.rows)
        bins = (top * BINS).long().clamp(max=BINS - 1)
        count = torch.bincount(bins, minlength=BINS)
        filled = count > 0
        confidence = torch.bincount(bins, top.double(), BINS)[filled] / count[filled]
        accuracy = torch.bincount(bins, right, BINS)[filled] / count[filled]
        ece = float(((confidence - accuracy).abs() * count[filled]).sum() / trace.rows)
        facts.append(
            ExitFacts(
                k, names[k], costs.cumulative(only)[k], float(right.mean()), low, high, ece,
                tuple(confidence.tolist()), tuple(accuracy.tolist()), tuple(count[filled].tolist()),
            )
        )  # fmt: skip
    return tuple(facts)


def _classes(test: ExitTrace) -> tuple[tuple[int, float, float, float], ...]:
    """(rows, recall, precision, F1) of the plain model for each class."""
    scores = class_scores(test.logits[-1].argmax(-1), test.known_labels("a report"), test.classes)
    columns = (scores.recall.tolist(), scores.precision.tolist(), scores.f1.tolist())
    return tuple((int(rows), *figures) for rows, *figures in zip(scores.rows.tolist(), *columns, strict=True))  # type: ignore[misc]


def _measured(speed: Speed) -> Measured:
    return Measured(
        speed.batch_size, speed.plain_ms, speed.policy_ms, speed.spread_ms, speed.speedup, speed.promise, speed.shares
    )


def pick_examples(
    outcome_exit: torch.Tensor, said: torch.Tensor, truth: torch.Tensor, probability: torch.Tensor, each: int = 3
) -> list[int]:
    """Rows to show: `each` right and `each` wrong ones of those that left first, and of those that left last."""
    picked: list[int] = []
    for earliest in (True, False):
        for right in (True, False):
            rows = ((said == truth) == right).nonzero().flatten().tolist()
            rows.sort(key=lambda i: (int(outcome_exit[i]) * (1 if earliest else -1), -float(probability[i])))
            picked += [i for i in rows if i not in picked][:each]
    return picked
