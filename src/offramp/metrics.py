"""Metrics of answers, intervals, and which rows lie so near a decision that another engine may decide otherwise."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from offramp.errors import ValueRangeError
from offramp.policies.base import Policy, at_exit
from offramp.policies.bins import AccuracyBins
from offramp.simulate import Outcome, walk
from offramp.trace import ExitTrace

__all__ = [
    "METRICS",
    "ClassScores",
    "accuracy_interval",
    "bootstrap_difference",
    "class_scores",
    "metric_interval",
    "metric_of",
    "near_decision",
    "rate_interval",
]

#: Names of metrics, higher is better; from 0 to 1, but "matthews" from -1. "f1" is of the last class, as in GLUE.
METRICS = ("accuracy", "balanced-accuracy", "macro-f1", "f1", "matthews")


@dataclass(frozen=True, eq=False)
class ClassScores:
    """Precision, recall and F1 of each class, and its number of rows; float64 and int64 [cls]. 0 where undefined."""

    precision: Float[Tensor, "cls"]
    recall: Float[Tensor, "cls"]
    f1: Float[Tensor, "cls"]
    rows: Int[Tensor, "cls"]
    said: Int[Tensor, "cls"]


def class_scores(said: Int[Tensor, "row"], labels: Int[Tensor, "row"], classes: int) -> ClassScores:
    """The scores of each class for answers `said` to rows with these labels."""
    right = torch.bincount(labels[said == labels], minlength=classes).double()
    rows, answers = (torch.bincount(values, minlength=classes) for values in (labels, said))
    precision, recall = right / answers.clamp(min=1), right / rows.clamp(min=1)
    return ClassScores(precision, recall, 2 * right / (rows + answers).clamp(min=1), rows, answers)


def metric_of(name: str, said: Int[Tensor, "row"], labels: Int[Tensor, "row"], classes: int) -> float:
    """A metric of answers. Classes that no row has are left out of means, except in F1 when they are answered:
    as scikit-learn's `f1_score(average="macro")` and `balanced_accuracy_score` count; `f1_score(pos_label=last)` and
    `matthews_corrcoef`, GLUE's metrics of MRPC and CoLA.

    Raises:
        ValueRangeError: the metric is unknown, or there are no rows.
    """
    if name not in METRICS or not len(labels):
        raise ValueRangeError(f"the metric is {name!r} of {len(labels)} rows; expected one of {', '.join(METRICS)}.")
    if name == "accuracy":
        return float((said == labels).double().mean())
    scores = class_scores(said, labels, classes)
    if name == "balanced-accuracy":
        return float(scores.recall[scores.rows > 0].mean())
    if name == "f1":
        return float(scores.f1[-1])
    if name == "matthews":
        return _matthews(int((said == labels).sum()), scores)
    return float(scores.f1[(scores.rows + scores.said) > 0].mean())


def _matthews(right: int, scores: ClassScores) -> float:
    """Matthews' correlation for any number of classes (Gorodkin 2004); 0 where all answers or all rows are of one."""
    rows, said = scores.rows.double(), scores.said.double()
    total = float(rows.sum())
    spread = math.sqrt(float((total**2 - (said**2).sum()) * (total**2 - (rows**2).sum())))
    return (right * total - float((rows * said).sum())) / spread if spread else 0.0


def metric_interval(
    name: str, said: Int[Tensor, "row"], labels: Int[Tensor, "row"], classes: int, *, draws: int = 500, seed: int = 0
) -> tuple[float, float]:
    """A 95 % interval of a metric: Wilson's of accuracy, a seeded percentile bootstrap over rows of the others.

    Raises:
        ValueRangeError: the metric is unknown, or there are no rows.
    """
    rows = len(labels)
    if name == "accuracy":
        return accuracy_interval(int((said == labels).sum()), rows)
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(draws):
        index = torch.randint(rows, (rows,), generator=generator)
        values.append(metric_of(name, said[index], labels[index], classes))
    low, high = torch.quantile(
        torch.tensor(values, dtype=torch.float64), torch.tensor([0.025, 0.975]).double()
    ).tolist()
    return low, high


def accuracy_interval(right: int, rows: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of an accuracy, by default at 95 %.

    Raises:
        ValueRangeError: there are no rows.
    """
    if rows < 1 or not 0 <= right <= rows:
        raise ValueRangeError(f"{right} right of {rows} rows; expected at least one row.")
    p = right / rows
    centre = (p + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z * math.sqrt(p * (1 - p) / rows + z * z / (4 * rows * rows)) / (1 + z * z / rows)
    return max(0.0, centre - half), min(1.0, centre + half)


def rate_interval(per_row: Float[Tensor, "row"]) -> tuple[float, float]:
    """A 95 % interval of a mean of values in [0, 1]: Wilson's where all are 0 or 1, else normal over rows.

    Raises:
        ValueRangeError: there are no rows.
    """
    if bool(((per_row == 0) | (per_row == 1)).all()):
        return accuracy_interval(int(per_row.sum()), len(per_row))
    mean, half = float(per_row.mean()), 1.96 * float(per_row.std(correction=0)) / len(per_row) ** 0.5
    return max(0.0, mean - half), min(1.0, mean + half)


def bootstrap_difference(
    ours: Bool[Tensor, "row"] | Float[Tensor, "row"],
    theirs: Bool[Tensor, "row"] | Float[Tensor, "row"],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(difference, low, high) of two accuracies on the same rows: mean and paired 95 % bootstrap interval.

    A draw of rows with replacement draws how often each difference occurs, which is multinomial: few different
    differences, as for right and wrong answers, take no pass over the rows. With few rows that differ the interval is
    somewhat short (86 % instead of 95 % where two of 100 rows differ), and it is of the policies as they were fitted:
    what another calibration split would have given is not in it.

    Raises:
        ValueRangeError: there are no rows, or not as many of one as of the other.
    """
    rows = len(ours)
    if rows < 1 or len(theirs) != rows:
        raise ValueRangeError(f"{rows} and {len(theirs)} rows; expected the same rows twice, at least one.")
    values, counts = (ours.double() - theirs.double()).unique(return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(rows, counts.double().numpy() / rows, size=draws)
    means = torch.from_numpy(drawn).double() @ values / rows
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values @ counts.double() / rows), low, high


def near_decision(
    policy: Policy, trace: ExitTrace, outcome: Outcome, tolerance: float = 1e-5, *, shakes: int = 8, seed: int = 0
) -> Bool[Tensor, "row"]:
    """Where rounding could flip a decision: at an exit up to the one taken, the score lies within `tolerance` of its
    threshold, or the two largest logits do (agreement and patience flip on ties).

    Counts and bins reach their thresholds exactly, and what rounding can change there lies before the score. So for
    policies without free scores the logits are shaken by noise of that size instead, `shakes` times.
    """
    near = torch.zeros(trace.rows, dtype=torch.bool)
    thresholds: Any = getattr(policy, "thresholds", None)
    free = not isinstance(policy, AccuracyBins) and "thresholds" in getattr(policy, "__dataclass_fields__", {})
    walked = walk(policy, trace)
    for index, k in enumerate(walked.visited):
        reached = outcome.exit >= k
        if trace.classes > 1:
            top = trace.logits[k].topk(2, dim=-1).values
            near |= reached & (top[:, 0] - top[:, 1] < tolerance)
        if free and k < trace.exits - 1:
            near |= reached & ((walked.score[index] - at_exit(thresholds, k)).abs() < tolerance)
    if not free:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(shakes):
            noise = tolerance * torch.randn(trace.logits.shape, generator=generator)
            other = replace(trace, logits=trace.logits + noise)
            stop = walk(policy, other).stop.int().argmax(dim=0)
            near |= torch.tensor(walked.visited)[stop] != outcome.exit
    return near
