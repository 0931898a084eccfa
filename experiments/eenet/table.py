"""EENet's table: policies on the same exits at about 75, 70, 62 and 50 % of the full cost, in FLOPs and, where a cost
model was timed, in milliseconds; halves of the rows that training never saw, swapped, five times. Writes
results/eenet/NAME.json.

    python -m experiments.eenet.table cifar10           # from results/eenet/basic-0.safetensors
    python -m experiments.eenet.table cifar10-tuned     # from results/eenet/tuned-0.safetensors
    python -m experiments.eenet.table sst2              # from results/beem, exits behind layers 2, 4, 6 and behind all
    python -m experiments.eenet.table ag_news

BranchyNet is entropy, PABEE is patience; `stopping` is our own.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from experiments.beem.run import PUT_ON
from experiments.judge import Cells, alone, answers, difference, told

from offramp import Budget, CostModel, ExitTrace
from offramp.artefacts import read_json, write_json
from offramp.meter import Meter
from offramp.pools import halves

FAMILIES = ("eenet", "entropy", "msdnet", "patience", "beem-c", "beem-a", "max-prob", "stopping")
BUDGETS = (0.75, 0.7, 0.62, 0.5)
REPEATS = 5
RESULTS = Path("results/eenet")
IMAGES = {"cifar10": "basic", "cifar10-tuned": "tuned"}  # networks, as `train` calls them
#: The exits of each table, by place; the last one is always among them.
EXITS = {
    **{name: {"three exits": (0, 3, 4), "five exits": (0, 1, 2, 3, 4)} for name in IMAGES},
    "sst2": {"after layers 2, 4, 6": (1, 3, 5), "after every layer": (0, 1, 2, 3, 4, 5)},
    "ag_news": {"after layers 2, 4, 6": (1, 3, 5), "after every layer": (0, 1, 2, 3, 4, 5)},
}


def source(name: str) -> tuple[ExitTrace, CostModel, dict[str, Any]]:
    """(what all exits said, what they cost, how the network was trained)."""
    timed = RESULTS / f"{name}-costs.json"
    if name in IMAGES:
        made = RESULTS / f"{IMAGES[name]}-0"
        if not made.with_suffix(".json").exists():
            raise SystemExit(f"not trained yet: python -m experiments.eenet.train {IMAGES[name]} --data DIR")
        costs = CostModel.load(timed if timed.exists() else f"{made}-costs.json")
        return ExitTrace.load(made.with_suffix(".safetensors")), costs, read_json(made.with_suffix(".json"))
    cells = Cells()
    task = next((task for task in (f"{name}-full", name) if f"{task}-{PUT_ON}-0" in cells.told), None)
    got = None if task is None else cells(task, PUT_ON, 0)
    if task is None or got is None:
        raise SystemExit(f"{name} is not trained yet: python -m experiments.beem.run --data DIR --only {name}")
    return got[0], CostModel.load(timed) if timed.exists() else got[1], cells.told[f"{task}-{PUT_ON}-0"]


def only(trace: ExitTrace, costs: CostModel, exits: Sequence[int]) -> tuple[ExitTrace, CostModel]:
    """The same network with some of its exits: stages in between become one. Times of joined stages are added up."""
    ends, begins = list(exits), [0, *(k + 1 for k in exits[:-1])]
    spans = list(zip(begins, ends, strict=True))
    joined = tuple(sum(costs.stage[a : b + 1]) for a, b in spans)
    timed = tuple(
        replace(
            t, stage_s=tuple(sum(t.stage_s[a : b + 1]) for a, b in spans), head_s=tuple(t.head_s[k] for k in exits),
            regroup_s=tuple(t.regroup_s[k] for k in exits) if t.regroup_s else (),
        )
        for t in costs.timed
    )  # fmt: skip
    fewer = replace(costs, stage=joined, head=tuple(costs.head[k] for k in exits), timed=timed)
    return replace(trace, logits=trace.logits[ends], signals=None, signal_names=()), fewer


def targets_of(costs: CostModel) -> list[Budget]:
    """The budgets, by FLOPs and by the time at batch 1 and the largest that was measured."""
    found = [Budget(fraction=b) for b in BUDGETS]
    for timed in costs.timed[:: max(1, len(costs.timed) - 1)]:
        found += [Budget(ms=1000 * b * timed.plain_s, batch_size=timed.batch_size) for b in BUDGETS]
    return found


def table(trace: ExitTrace, costs: CostModel, progress: Any) -> dict[str, Any]:
    """Every family at every budget, with paired differences to EENet and to the plain network's answers."""
    pools, targets, last = halves(trace, REPEATS), targets_of(costs), alone(trace, trace.exits - 1)
    found: dict[str, list[dict[str, Any]]] = {}
    for family in FAMILIES:
        found[family] = answers(trace, costs, family, targets, pools)
        progress()
    rows = []
    for place, target in enumerate(targets):
        base = found["eenet"][place]
        asked = BUDGETS[place % len(BUDGETS)]
        for family in FAMILIES:
            rows.append({
                "family": family, "asked": asked, "unit": target.unit, "batch_size": target.batch_size,
                **told(found[family][place], eenet=base, full=last),
            })  # fmt: skip
    best = {f"{t}": max(FAMILIES, key=lambda f: found[f][i]["accuracy"]) for i, t in enumerate(targets)}
    return {
        "rows": rows, "best": best, "exits": [told(alone(trace, k)) for k in range(trace.exits)],
        "cumulative": costs.cumulative(), "held_out": trace.rows,
        "ours_less_best": [
            difference(found["stopping"][i]["right"], found[best[f"{t}"]][i]["right"]) for i, t in enumerate(targets)
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXITS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trace, costs, cell = source(options.name)
    with Meter(options.name, len(EXITS[options.name]) * len(FAMILIES), show=True) as meter:
        tables = {name: table(*only(trace, costs, exits), meter.advance) for name, exits in EXITS[options.name].items()}
    path = write_json(
        RESULTS / f"{options.name}.json",
        {"budgets": BUDGETS, "repeats": REPEATS, "tables": tables, "cell": cell, "timed_on": costs.machine,
         "engine": costs.engine},
    )  # fmt: skip
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
