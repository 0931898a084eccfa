"""What policies answer to rows that they were not calibrated on, with every row's share of right answers kept so that
any two can be compared row by row."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp import Calibration, CostModel, ExitTrace, MaxDrop
from offramp.artefacts import read_json, write_atomically
from offramp.calibrate import Target
from offramp.choices import calibrator_of
from offramp.metrics import bootstrap_difference, metric_interval, metric_of
from offramp.pools import Pool
from offramp.sweep import Sweep

METRICS = ("accuracy", "f1", "matthews")


class Cells:
    """What `experiments.beem.run` kept of its trainings, by name."""

    def __init__(self, folder: Path = Path("results/beem")) -> None:
        self.folder, self.told = folder, read_json(folder / "cells.json")

    def __call__(self, task: str, name: str, seed: int) -> tuple[ExitTrace, CostModel] | None:
        """(what the exits said about the held-out rows, what they cost), None when it is not trained."""
        cell = f"{task}-{name}-{seed}"
        if cell not in self.told:
            return None
        fields = self.told[cell]["costs"]["fields"]
        costs = CostModel(tuple(fields["stage"]), tuple(fields["head"]), fields["plain_flops"])
        return ExitTrace.load(self.folder / f"{cell}.safetensors"), costs


@dataclass(frozen=True, eq=False)
class NearPlain:
    """At most `margin` of a metric under the network without exits, on the calibration rows.

    Args:
        plain: its trace, of the same rows.
        margin: in parts of one.
        metric: one of `METRICS`.
    """

    plain: ExitTrace
    margin: float
    metric: str

    def of(self, pool: Pool) -> MaxDrop:
        """The drop from the last exit that this allows on a pool's calibration rows, those that it does not test."""
        rows = torch.ones(self.plain.rows, dtype=torch.bool)
        rows[pool.test_rows] = False
        fit, labels = self.plain.select(rows.nonzero().flatten()), pool.fit.known_labels("the margin")
        last, plain = (
            metric_of(self.metric, each.logits[-1].argmax(-1), labels, each.classes) for each in (pool.fit, fit)
        )
        return MaxDrop(min(max(0.0, last - plain + self.margin), 1.0), self.metric)

    def __str__(self) -> str:
        return f"{self.metric} at most {100 * self.margin:.1f} points under plain"


def margin_of(task: str, plain: ExitTrace, metric: str) -> float:
    """What may be lost: 0.3 points of SST-2, elsewhere half a point or a standard error of the metric, what is more."""
    if task.startswith("sst2"):
        return 0.003
    said, labels = plain.logits[-1].argmax(-1), plain.known_labels("the margin")
    low, high = metric_interval(metric, said, labels, plain.classes)
    return max(0.005, (high - low) / (2 * 1.96))


def answers(
    trace: ExitTrace, costs: CostModel, family: str, targets: Sequence[Target | NearPlain], pools: Sequence[Pool]
) -> list[dict[str, Any]]:
    """For every target: each row's share of right answers, the metrics' means over splits, and the mean cost."""
    found: list[list[tuple[Calibration, Any]]] = [[] for _ in targets]
    for pool in pools:
        calibrator, sweep = calibrator_of(family, pool.fit, costs), Sweep(pool.test, costs)
        for place, target in enumerate(targets):
            made = calibrator.to(target.of(pool) if isinstance(target, NearPlain) else target, None)
            found[place].append((made, sweep(made.policy)))
    return [_mean(trace, target, each, pools) for target, each in zip(targets, found, strict=True)]


def _mean(trace: ExitTrace, target: Target | NearPlain, found: Sequence[Any], pools: Sequence[Pool]) -> dict[str, Any]:
    right, times = torch.zeros(trace.rows, dtype=torch.float64), torch.zeros(trace.rows, dtype=torch.float64)
    values, cost = [], 0.0
    for (_, said), pool in zip(found, pools, strict=True):
        labels = pool.test.known_labels("the table")
        right.index_add_(0, pool.test_rows, (said.said == labels).double())
        times.index_add_(0, pool.test_rows, torch.ones(len(labels), dtype=torch.float64))
        values.append([metric_of(name, said.said, labels, trace.classes) for name in METRICS])
        cost += said.cost / len(pools)
    means = torch.tensor(values, dtype=torch.float64).mean(0).tolist()
    return {
        "target": str(target), "right": right / times, **dict(zip(METRICS, means, strict=True)), "cost": cost,
        "status": "/".join(sorted({made.status for made, _ in found})),
        "shares": torch.tensor([said.shares for _, said in found]).double().mean(0).tolist(),
    }  # fmt: skip


def alone(trace: ExitTrace, k: int) -> dict[str, Any]:
    """What one exit answers to every row."""
    said, labels = trace.logits[k].argmax(-1), trace.known_labels("the table")
    found = {name: metric_of(name, said, labels, trace.classes) for name in METRICS}
    return {"right": (said == labels).double(), **found}


def difference(one: Tensor, other: Tensor) -> dict[str, float]:
    """The mean difference of two rows of right answers, with its paired 95 % bootstrap interval over rows."""
    mean, low, high = bootstrap_difference(one, other)
    return {"value": mean, "low": low, "high": high}


def told(found: dict[str, Any], **bases: dict[str, Any] | None) -> dict[str, Any]:
    """The figures without the rows, with a paired difference in accuracy to every base: `less_NAME`."""
    row = {name: value for name, value in found.items() if name != "right"}
    for name, base in bases.items():
        if base is not None:
            row[f"less_{name}"] = difference(found["right"], base["right"])
    return row


def digest_of(*sources: Path) -> str:
    """Of source files, and of all in folders, by what they hold: whether code has changed since something was made."""
    files = [file for path in sources for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def write_rows(path: Path, value: dict[str, Any]) -> Path:
    """The path, after `value` was written to it as JSON, atomically, whatever fits on a line on one."""
    text = _fitted(value, 0) + "\n"
    return write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _fitted(value: Any, depth: int) -> str:
    one = json.dumps(value, allow_nan=False)
    if len(one) <= 600 or not isinstance(value, dict | list):
        return one
    if isinstance(value, dict):
        parts, marks = [f"{json.dumps(name)}: {_fitted(each, depth + 1)}" for name, each in value.items()], "{}"
    else:
        parts, marks = [_fitted(each, depth + 1) for each in value], "[]"
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    return marks[0] + inner + f",{inner}".join(parts) + outer + marks[1]
