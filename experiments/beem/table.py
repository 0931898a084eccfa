"""BEEM's table and the ablation of training recipes, from what `run.py` kept in results/beem: policies calibrated on
one half of the held-out rows and judged on the other, halves swapped, ten times. Writes results/beem/table.json.

    python -m experiments.beem.table                      # what is trained so far; about half an hour on one core

"plain" is the network fine-tuned without exits, "static-k" its first k layers fine-tuned alone.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from experiments.beem.cells import LAYERS, VARIANTS
from experiments.beem.run import ABLATION, BASE, BEST, JOINT, SMALL, TASKS
from experiments.judge import Cells, alone, answers, difference, told

from offramp import Budget, ErrorRate, MaxDrop
from offramp.artefacts import write_json
from offramp.meter import Meter
from offramp.pools import halves
from offramp.tasks import TEXT_TASKS

FAMILIES = (
    "max-prob", "entropy", "patience", "f-pabee", "ztw", "jei-dnn", "eenet", "beem-c", "beem-a", "stopping",
)  # fmt: skip
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7)
REPEATS = 10
RESULTS = Path("results/beem")


def recipes(task: str, cells: Cells, progress: Any) -> list[dict[str, Any]]:
    """Every recipe: each exit alone, and how right max-prob and BEEM-A are at every budget; the mean over budgets and
    its paired difference to the recipe that the others differ from in one thing."""
    table, base = [], None
    for name in (BASE, *(each for each in (*ABLATION, *JOINT) if each != BASE)):
        got = cells(task, name, 0)
        progress()
        if got is None:
            continue
        trace, costs = got
        pools = halves(trace, REPEATS)
        frontier: dict[str, list[dict[str, Any]]] = {}
        right = torch.zeros(trace.rows, dtype=torch.float64)
        for family in ("max-prob", "beem-a"):
            found = answers(trace, costs, family, [Budget(fraction=b) for b in BUDGETS], pools)
            right += sum(each["right"] for each in found) / (2 * len(BUDGETS))
            frontier[family] = [told(each) for each in found]
        base = right if base is None else base
        table.append({
            "variant": name, "exits": [told(alone(trace, k)) for k in range(trace.exits)], "frontier": frontier,
            "mean": float(right.mean()), "less_base": difference(right, base),
            "seconds": cells.told[f"{task}-{name}-0"]["seconds"],
        })  # fmt: skip
    return table


def policies(task: str, seed: int, cells: Cells, progress: Any) -> dict[str, Any] | None:
    """Every family on the exits of the best recipe, at every budget and at accuracy at or above the last exit."""
    got, plain = cells(task, BEST, seed), cells(task, "plain", seed)
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
        for found in answers(trace, costs, family, targets, pools):
            rows.append({"family": family, **told(found, plain=base)})
        progress()
    statics = {}
    for name in ("static-2", "static-3", "static-4"):
        other = cells(task, name, seed)
        if other is not None:
            statics[name] = {"cost": VARIANTS[name].layers / LAYERS, **told(alone(other[0], 0), plain=base)}
    return {
        "task": task, "seed": seed, "metric": metric, "rows": rows, "static": statics, "held_out": trace.rows,
        "plain": None if base is None else told(base), "last": told(alone(trace, LAYERS - 1), plain=base),
        "exits": [told(alone(trace, k)) for k in range(trace.exits)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", default=",".join((*TASKS, "sst2-full")), help="tasks, with commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells, tasks = Cells(options.results), options.only.split(",")
    wanted = [(task, 0) for task in tasks] + [(task, seed) for task in tasks if task in SMALL for seed in (1, 2)]
    out = options.results / "table.json"
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"recipes": {}, "policies": []}
    steps = len(tasks) * len((*ABLATION, *JOINT)) + len(wanted) * len(FAMILIES)
    with Meter("tables", steps, show=True) as meter:
        ablation = {task: found for task in tasks if (found := recipes(task, cells, meter.advance))}
        tables = [found for task, seed in wanted if (found := policies(task, seed, cells, meter.advance))]
    kept = [table for table in before["policies"] if table["task"] not in tasks]
    value = {
        "budgets": BUDGETS, "repeats": REPEATS, "best": BEST, "recipes": {**before["recipes"], **ablation},
        "policies": kept + tables,
    }  # fmt: skip
    write_json(out, value)
    print(f"wrote {out}: {len(cells.told)} trainings, {len(value['policies'])} tables")


if __name__ == "__main__":
    main()
