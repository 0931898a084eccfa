"""BEEM's table and the ablation of training recipes, from what `run.py` kept in results/beem: policies calibrated on
one half of the held-out rows and judged on the other, halves swapped, twenty times. Writes results/beem/table.json.

    python -m experiments.beem.table                      # what is trained so far; about 40 minutes on two cores
    python -m experiments.beem.table --recipes            # the ablation alone; seconds

What is judged is kept in runs/beem/judged; given again, it goes on. The policies' tables are of networks that were
all trained as long: "plain" without exits, "static-k" its first k layers alone.
"""

import argparse
import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from experiments import judge
from experiments.beem.cells import LAYERS, VARIANTS
from experiments.beem.run import ABLATION, BASE, BEST, DEFAULT, JOINT, PLAIN, SMALL, STATICS, TASKS
from experiments.judge import (
    METRICS,
    Cells,
    NearPlain,
    alone,
    answers,
    difference,
    digest_of,
    margin_of,
    told,
    write_rows,
)

import offramp
from offramp import Budget, CostModel, ErrorRate, ExitTrace, MaxDrop
from offramp.artefacts import write_atomically
from offramp.meter import Meter
from offramp.pools import halves
from offramp.tasks import TEXT_TASKS

FAMILIES = (
    "max-prob", "entropy", "patience", "f-pabee", "ztw", "jei-dnn", "eenet", "beem-c", "beem-a", "stopping",
)  # fmt: skip
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7)
LEADING = ("max-prob", "stopping")  # these are judged beside the static networks
SEEDS = (0, 1, 2)
REPEATS, RECIPE_REPEATS = 20, 10
RESULTS = Path("results/beem")


def recipes(task: str, cells: Cells) -> list[dict[str, Any]]:
    """Every recipe, the mean of its training seeds: each exit alone, and how right max-prob and BEEM-A are at every
    budget; the mean over budgets, and its paired differences, over the seeds that both have, to the recipe that the
    others differ from in one thing, and to the default of `train`."""
    table, rights = [], dict[str, dict[int, torch.Tensor]]()
    names = (BASE, *(each for each in (*ABLATION, *JOINT) if each != BASE))
    for name in names if cells(task, BASE, 0) else ():
        found = {seed: _frontier(*got) for seed in SEEDS if (got := cells(task, name, seed))}
        if 0 not in found:
            continue
        rights[name] = {seed: each["right"] for seed, each in found.items()}
        seeds = list(found.values())
        table.append({
            "variant": name, "seeds": list(found), "epochs": epochs(name),
            "exits": [told(_over([each["exits"][k] for each in seeds])) for k in range(len(seeds[0]["exits"]))],
            "frontier": {family: [told(_over([each["frontier"][family][place] for each in seeds]))
                                  for place in range(len(BUDGETS))] for family in seeds[0]["frontier"]},
            "mean": float(_mean(rights[name], rights[name]).mean()),
            "seconds": sum(cells.told[f"{task}-{name}-{seed}"]["seconds"] for seed in found) / len(found),
        })  # fmt: skip
    for row in table:
        mine = rights[row["variant"]]
        for name, base in (("less_base", BASE), ("less_default", DEFAULT)):
            if base in rights:
                both = difference(_mean(mine, rights[base]), _mean(rights[base], mine))
                row[name] = {**both, "trainings": len(mine.keys() & rights[base].keys())}
    return table


def _frontier(trace: ExitTrace, costs: CostModel) -> dict[str, Any]:
    """How right two policies are at every budget, the mean over all of them, and each exit alone."""
    pools = halves(trace, RECIPE_REPEATS)
    targets = [Budget(fraction=b) for b in BUDGETS]
    frontier = {family: answers(trace, costs, family, targets, pools) for family in ("max-prob", "beem-a")}
    every = [each["right"] for found in frontier.values() for each in found]
    return {"right": torch.stack(every).mean(0), "frontier": frontier,
            "exits": [alone(trace, k) for k in range(trace.exits)]}  # fmt: skip


def _mean(rights: dict[int, torch.Tensor], other: dict[int, torch.Tensor]) -> torch.Tensor:
    """Over the seeds that both have."""
    return torch.stack([right for seed, right in rights.items() if seed in other]).mean(0)


def longer(task: str, cells: Cells) -> dict[str, Any]:
    """The network without exits, trained as usual and for as long as the recipes in all; paired with the former, over
    the seeds that both have."""
    plain = {seed: alone(got[0], got[0].exits - 1) for seed in SEEDS if (got := cells(task, "plain", seed))}
    table = {}
    for name in ("plain", PLAIN):
        mine = {seed: alone(got[0], got[0].exits - 1) for seed in plain if (got := cells(task, name, seed))}
        if mine:
            base = _over([plain[seed] for seed in mine])
            row = told(_over(list(mine.values())), plain=base)
            row["less_plain"]["trainings"] = len(mine)
            table[name] = {"epochs": epochs(name), "seeds": list(mine), **row}
    return table


def epochs(name: str) -> float:
    """Of a variant and of the network that it begins with, as a multiple of the plain network's."""
    variant = VARIANTS[name]
    return variant.epochs + (0.0 if variant.after is None else VARIANTS[variant.after].epochs)


def policies(task: str, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Every family on the exits of the best recipe: at every budget, at accuracy at or above the last exit, near the
    plain network, and at the cost of every static network; means over training seeds, with each seed's beside."""
    plain, last = _over([each["plain"] for each in seeds]), _over([each["last"] for each in seeds])
    statics = {name: _over([each["static"][name] for each in seeds if name in each["static"]])
               for name in STATICS if name in seeds[0]["static"]}  # fmt: skip
    rows = []
    for key in seeds[0]["rows"]:  # other seeds may have fewer static networks
        row = _over([each["rows"][key] for each in seeds if key in each["rows"]])
        rows.append(told(row, plain=plain, static=statics.get(row.get("static", ""))))
    return {
        "task": task, "seeds": [each["seed"] for each in seeds], "repeats": REPEATS,
        "metric": seeds[0]["metric"], "rows": rows,
        "static": {name: {"cost": VARIANTS[STATICS[name]].layers / LAYERS, **told(row, plain=plain)}
                   for name, row in statics.items()},
        "held_out": len(plain["right"]),
        "margin": sum(each["margin"] for each in seeds) / len(seeds), "plain": told(plain),
        "last": told(last, plain=plain),
        "exits": [told(_over([each["exits"][k] for each in seeds])) for k in range(LAYERS)],
    }  # fmt: skip


def one_seed(task: str, seed: int, cells: Cells) -> dict[str, Any] | None:
    """One seed's rows of right answers and figures; None when it is not trained."""
    got, other = cells(task, BEST, seed), cells(task, PLAIN, seed)
    if got is None or other is None:
        return None
    trace, costs = got
    pools, metric = halves(trace, REPEATS), TEXT_TASKS[task.removesuffix("-full")].metric
    static = {name: each[0] for name, kept in STATICS.items() if (each := cells(task, kept, seed))}
    margin = margin_of(task, other[0], metric)
    rows = dict[tuple[str, str], dict[str, Any]]()
    for family in FAMILIES:
        targets: list[Any] = [*(Budget(fraction=b) for b in BUDGETS), MaxDrop(0.0, metric)]
        targets.append(NearPlain(other[0], margin, metric))
        if family.startswith("beem"):
            targets.append(ErrorRate())
        for place, each in enumerate(answers(trace, costs, family, targets, pools)):
            rows[family, str(place)] = {"family": family, **each}
        if family in LEADING:
            same = {name: Budget(fraction=VARIANTS[STATICS[name]].layers / LAYERS) for name in static}
            found = answers(trace, costs, family, list(same.values()), pools)
            for name, each in zip(same, found, strict=True):
                rows[family, name] = {"family": family, "static": name, **each}
    return {
        "seed": seed, "metric": metric, "rows": rows, "margin": margin, "plain": alone(other[0], LAYERS - 1),
        "static": {name: alone(each, 0) for name, each in static.items()}, "last": alone(trace, LAYERS - 1),
        "exits": [alone(trace, k) for k in range(trace.exits)],
    }  # fmt: skip


def _over(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over training seeds of the same figures; of metrics also each seed's."""
    first = found[0]
    row = {name: value for name, value in first.items() if isinstance(value, str)}
    for name in ("right", "cost", "shares", *METRICS):
        if name in first:
            values = torch.stack([torch.as_tensor(each[name], dtype=torch.float64) for each in found])
            row[name] = values.mean(0) if name == "right" else values.mean(0).tolist()
            if name in METRICS and len(found) > 1:
                row[f"{name}_of_seeds"] = values.tolist()
    row["status"] = "/".join(sorted({each["status"] for each in found})) if "status" in first else "alone"
    return row


def thin(value: Any, metric: str, *without: str) -> Any:
    """Without the figures of metrics that are not the task's, except accuracy, and without others by their names."""
    if isinstance(value, list):
        return [thin(each, metric, *without) for each in value]
    if not isinstance(value, dict):
        return value
    gone = {
        *without,
        *(f"{name}{of}" for name in METRICS if name not in (metric, "accuracy") for of in ("", "_of_seeds")),
    }
    return {name: thin(each, metric, *without) for name, each in value.items() if name not in gone}


def _judged(work: tuple[str, str, int, Path, Path]) -> Any:
    """In a process of its own: the recipes of a task, or a seed of it with all policies. It is kept with what it was
    made from, and not made again."""
    what, task, seed, results, runs = work
    torch.set_num_threads(1)
    cells = Cells(results)
    made_from = {
        "weights": {name: cell["weights_sha256"] for name, cell in cells.told.items()
                    if cell["task"] == task and (what == "recipes" or cell["seed"] == seed)},
        "with": [what, FAMILIES, BUDGETS, LEADING, STATICS, REPEATS, RECIPE_REPEATS],
    }  # fmt: skip
    code = digest_of(Path(offramp.__file__).parent, Path(__file__), Path(judge.__file__))  # policies may change
    digest = hashlib.sha256(f"{json.dumps(made_from, sort_keys=True)}{code}".encode()).hexdigest()
    path = runs / "judged" / f"{what}-{task}-{seed}-{digest[:16]}.pt"
    if not path.exists():
        found = recipes(task, cells) if what == "recipes" else one_seed(task, seed, cells)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda to: torch.save(found, to))
    return torch.load(path, weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, default=Path("runs/beem"))
    parser.add_argument("--only", default=",".join((*TASKS, "sst2-full")), help="tasks, with commas")
    parser.add_argument("--recipes", action="store_true", help="these alone; the policies' tables stay as they are")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    tasks = options.only.split(",")
    wanted = [("recipes", task, 0) for task in tasks]
    if not options.recipes:
        wanted += [("seed", task, seed) for task in tasks for seed in SEEDS if seed == 0 or task in SMALL]
    work = [(*each, options.results, options.runs) for each in wanted]
    done = list[Any]()
    with (
        Meter("tables", len(work), show=True) as meter,
        ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool,
    ):
        for each in pool.map(_judged, work):
            done.append(each)
            meter.advance()
    by = dict(zip(wanted, done, strict=True))
    metrics = {task: TEXT_TASKS[task.removesuffix("-full")].metric for task in tasks}
    seeds = [f"{name}_of_seeds" for name in METRICS]
    ablation = {
        task: thin(by["recipes", task, 0], metrics[task], "shares", *seeds) for task in tasks if by["recipes", task, 0]
    }
    tables = [
        thin(policies(task, found), metrics[task])
        for task in tasks
        if (found := [by["seed", task, seed] for seed in SEEDS if by.get(("seed", task, seed))])
    ]
    out = options.results / "table.json"
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"recipes": {}, "policies": []}
    cells = Cells(options.results)
    value = {
        "without": {**before.get("without", {}), **{task: thin(longer(task, cells), metrics[task]) for task in tasks}},
        "budgets": BUDGETS, "best": BEST, "recipes": {**before["recipes"], **ablation},
        "policies": [each for each in before["policies"] if options.recipes or each["task"] not in tasks] + tables,
    }  # fmt: skip
    write_rows(out, value)
    print(f"wrote {out}: {len(cells.told)} trainings, {len(value['policies'])} tables")


if __name__ == "__main__":
    main()
