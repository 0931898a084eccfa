"""BEEM's table and the ablation of training recipes, from the trainings of `run.py`: policies calibrated on one half of
the held-out rows and judged on the other, halves swapped, ten times. Writes results/beem.json.

    python experiments/beem/table.py                      # what is trained so far; some minutes

"plain" is the network fine-tuned without exits, "static-k" its first k layers fine-tuned alone.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cells import LAYERS, VARIANTS, folder_of
from run import ABLATION, BEST, SMALL, TASKS
from torch import Tensor

from offramp import Budget, CostModel, ErrorRate, ExitTrace, MaxDrop
from offramp.artefacts import write_json
from offramp.choices import calibrator_of
from offramp.meter import Meter
from offramp.metrics import bootstrap_difference, metric_of
from offramp.pools import Pool, halves
from offramp.sweep import Sweep
from offramp.tasks import TEXT_TASKS

FAMILIES = (
    "max-prob", "entropy", "patience", "f-pabee", "ztw", "jei-dnn", "eenet", "beem-c", "beem-a", "stopping",
)  # fmt: skip
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7)
REPEATS = 10


def loaded(task: str, name: str, seed: int, runs: Path) -> tuple[ExitTrace, CostModel] | None:
    """(what the exits said about the held-out rows, what they cost) of a finished training."""
    folder = folder_of(task, name, seed, runs)
    if not (folder / "cell.json").exists():
        return None
    return ExitTrace.load(folder / "trace.safetensors"), CostModel.load(folder / "costs.json")


def answers(trace: ExitTrace, costs: CostModel, family: str, target: Any, pools: Sequence[Pool]) -> dict[str, Any]:
    """What a family answers to rows it was not calibrated on: each row's share of right answers, the metric's mean over
    splits, and the mean counted cost."""
    right, times = torch.zeros(trace.rows, dtype=torch.float64), torch.zeros(trace.rows, dtype=torch.float64)
    cost, values, statuses = 0.0, [], set()
    for pool in pools:
        found = calibrator_of(family, pool.fit, costs).to(target, None)
        said = Sweep(pool.test, costs)(found.policy)
        labels: Tensor = pool.test.labels  # type: ignore[assignment]
        right.index_add_(0, pool.test_rows, (said.said == labels).double())
        times.index_add_(0, pool.test_rows, torch.ones(len(labels), dtype=torch.float64))
        values.append([metric_of(name, said.said, labels, trace.classes) for name in ("accuracy", "f1", "matthews")])
        cost += said.cost / len(pools)
        statuses.add(found.status)
    mean = torch.tensor(values, dtype=torch.float64).mean(0).tolist()
    return {
        "right": right / times, "accuracy": mean[0], "f1": mean[1], "matthews": mean[2], "cost": cost,
        "status": "/".join(sorted(statuses)),
    }  # fmt: skip


def alone(trace: ExitTrace, k: int) -> dict[str, Any]:
    """What one exit answers to every row."""
    said, labels = trace.logits[k].argmax(-1), trace.known_labels("the table")
    found = {name: metric_of(name, said, labels, trace.classes) for name in ("accuracy", "f1", "matthews")}
    return {"right": (said == labels).double(), **found}


def row_of(found: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
    """The figures without the rows, and the paired difference in accuracy to a base on the same rows."""
    row = {name: value for name, value in found.items() if name != "right"}
    if base is not None:
        mean, low, high = bootstrap_difference(found["right"], base["right"])
        row["less_plain"] = {"value": mean, "low": low, "high": high}
    return row


def ablation(task: str, runs: Path, progress: Any) -> list[dict[str, Any]]:
    """Every recipe: each exit alone, and max-prob's and BEEM-A's answers at every budget."""
    table = []
    for name in ABLATION:
        got = loaded(task, name, 0, runs)
        progress()
        if got is None:
            continue
        trace, costs = got
        pools = halves(trace, REPEATS)
        frontier = {
            family: [row_of(answers(trace, costs, family, Budget(fraction=b), pools), None) for b in BUDGETS]
            for family in ("max-prob", "beem-a")
        }
        exits = [row_of(alone(trace, k), None) for k in range(trace.exits)]
        table.append({"variant": name, "exits": exits, "frontier": frontier})
    return table


def policies(task: str, seed: int, runs: Path, progress: Any) -> dict[str, Any] | None:
    """Every family on the exits of the best recipe, at every budget and at accuracy at or above the last exit."""
    got, plain = loaded(task, BEST, seed, runs), loaded(task, "plain", seed, runs)
    if got is None:
        return None
    trace, costs = got
    pools = halves(trace, REPEATS)
    base = None if plain is None else alone(plain[0], LAYERS - 1)
    metric = TEXT_TASKS[task.removesuffix("-full")].metric
    rows = []
    for family in FAMILIES:
        targets: list[Any] = [*(Budget(fraction=b) for b in BUDGETS), MaxDrop(0.0, metric)]
        if family.startswith("beem"):
            targets.append(ErrorRate())
        for target in targets:
            found = answers(trace, costs, family, target, pools)
            rows.append({"family": family, "target": str(target), **row_of(found, base)})
        progress()
    statics = {}
    for name in ("static-2", "static-3", "static-4"):
        other = loaded(task, name, seed, runs)
        if other is not None:
            statics[name] = {"cost": VARIANTS[name].layers / LAYERS, **row_of(alone(other[0], 0), base)}
    return {
        "task": task, "seed": seed, "metric": metric, "rows": rows, "static": statics, "held_out": trace.rows,
        "plain": None if base is None else row_of(base, None), "last": row_of(alone(trace, LAYERS - 1), base),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/beem"))
    parser.add_argument("--out", type=Path, default=Path("results/beem.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [(task, 0) for task in (*TASKS, "sst2-full")] + [(task, seed) for task in SMALL for seed in (1, 2)]
    with Meter("tables", len(TASKS) * len(ABLATION) + len(wanted) * len(FAMILIES), show=True) as meter:
        recipes = {task: ablation(task, options.runs, meter.advance) for task in TASKS}
        tables = [found for task, seed in wanted if (found := policies(task, seed, options.runs, meter.advance))]
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(options.runs.glob("*/cell.json"))]
    write_json(
        options.out,
        {"budgets": BUDGETS, "repeats": REPEATS, "best": BEST, "ablation": recipes, "policies": tables, "cells": cells},
    )
    print(f"wrote {options.out}: {len(cells)} trainings, {len(tables)} tables")


if __name__ == "__main__":
    main()
