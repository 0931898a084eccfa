"""All trainings of BEEM's table and of the ablation, a few at a time, each in a process of its own. What is finished is
not trained again, what was stopped goes on. Weights stay in runs/beem; what the exits said of held-out rows goes to
results/beem/TASK-VARIANT-SEED.safetensors, and how each was trained to results/beem/cells.json.

    python -m experiments.beem.run --data DIR --list                # what there is to do, and about how long it takes
    python -m experiments.beem.run --data DIR --workers 2           # logs in runs/beem/*.log
    python -m experiments.beem.run --data DIR --only rte,mrpc       # some tasks
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.beem.cells import VARIANTS, epochs_of, folder_of

from offramp import ExitTrace
from offramp.artefacts import write_json
from offramp.meter import duration

SMALL = ("rte", "mrpc", "cola", "qnli")
TASKS = ("sst2", *SMALL)
ABLATION = tuple(name for name in VARIANTS if name.startswith("taught"))
JOINT = ("depth", "longer", "longer-self", "longer-pooler", "longer-self-pooler", "plain-first", "heads-after")
BASE = "taught"  # what the recipes differ from in one thing
DEFAULT = "longer"  # the default of `offramp.train`, at the same cost
PUT_ON = "taught-self"  # the exits of EENet's tables: put on a fine-tuned network, as a user has it
# BEEM's table: exits, the network without them and its first layers alone, all trained as long
BEST, PLAIN = "longer-self-pooler", "plain-longer"
STATICS = {f"static-{k}": f"static-{k}-pooler" for k in (2, 3, 4)}
#: guessed from steps of MRPC: an epoch with exits, one of two threads, with native bf16; SST-2's 20,000 rows in fp32
MINUTES = {"sst2": 6, "sst2-full": 7, "rte": 1.3, "mrpc": 1.7, "cola": 0.8, "qnli": 1.3, "ag_news": 4}

Cell = tuple[str, str, int]


def plan() -> list[Cell]:
    """Every cell, the most telling first: networks without exits, which others begin with, recipes, then seeds."""
    first = ("plain", PUT_ON, "taught", "static-3", "taught-labels")
    cells = [(task, name, 0) for task in ("sst2", "rte", "cola", "mrpc", "qnli") for name in first]
    cells += [(task, name, 0) for name in ("static-2", "static-4") for task in TASKS]
    cells += [("ag_news", name, 0) for name in ("plain", PUT_ON, "static-3")]
    cells += [(task, name, seed) for seed in (1, 2) for name in ("plain", PUT_ON, "static-3") for task in SMALL]
    mixed = ("cola", "rte", "mrpc", "qnli", "sst2")
    cells += [(task, name, 0) for name in (*JOINT, PLAIN) if name != "longer-pooler" for task in mixed]
    cells += [(task, name, seed) for seed in (1, 2) for name in ("longer-self", BEST, DEFAULT, PLAIN) for task in SMALL]
    cells += [(task, STATICS[f"static-{k}"], 0) for k in (3, 2, 4) for task in mixed]
    cells += [(task, STATICS["static-3"], seed) for seed in (1, 2) for task in SMALL]
    cells += [(task, "longer-pooler", 0) for task in mixed]
    cells += [(task, name, 0) for name in ABLATION for task in mixed]
    cells += [(task, f"static-{k}-longer", 0) for k in (2, 3, 4) for task in mixed]
    cells += [("sst2-full", name, 0) for name in (PLAIN, BEST, *STATICS.values())]
    return list(dict.fromkeys(cells))


def minutes(cell: Cell) -> float:
    """About how long a cell takes on one thread of the machine that the figures are of."""
    task, name, _ = cell
    epochs = epochs_of(task, VARIANTS[name])
    return epochs * MINUTES[task] * VARIANTS[name].layers / 6 + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/beem"))
    parser.add_argument("--results", type=Path, default=Path("results/beem"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--only", default=None, help="tasks, with commas")
    parser.add_argument("--variants", default=None, help="variants, with commas")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    wanted = [
        cell for cell in plan()
        if (options.only is None or cell[0] in options.only.split(","))
        and (options.variants is None or cell[1] in options.variants.split(","))
    ]  # fmt: skip
    options.runs.mkdir(parents=True, exist_ok=True)
    for cell in plan():
        keep(cell, options.runs, options.results)
    left = unfinished(wanted, options.runs, options.results)
    total = sum(map(minutes, left)) / options.workers
    print(
        f"{len(wanted)} trainings, {len(wanted) - len(left)} done; about {duration(60 * total)} for the others",
        flush=True,
    )
    if options.list:
        for cell in left:
            print(f"  {' '.join(map(str, cell))}: about {minutes(cell):.0f} min")
        return
    failed, over = [], {cell: threading.Event() for cell in left}
    with ThreadPoolExecutor(options.workers) as pool:
        for cell, code in zip(left, pool.map(lambda each: _train(each, options, over), left), strict=True):
            if code:
                failed.append(cell)
            else:
                keep(cell, options.runs, options.results)
    if failed:
        raise SystemExit(
            f"failed: {', '.join(' '.join(map(str, cell)) for cell in failed)}; see the logs in {options.runs}"
        )


def unfinished(wanted: list[Cell], runs: Path, results: Path) -> list[Cell]:
    """What is still to be trained: also what is finished and whose weights, which others begin with, are not here."""
    index = results / "cells.json"
    known = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    left = [cell for cell in wanted if folder_of(*cell, runs).name not in known]
    begun_with = {(task, VARIANTS[name].after, seed) for task, name, seed in left}
    gone = [c for c in plan() if c in begun_with and c not in left and not (folder_of(*c, runs) / "cell.json").exists()]
    return [*gone, *left]


def keep(cell: Cell, runs: Path, results: Path) -> None:
    """The small files of a finished cell, where tables are made from; nothing when it is not finished."""
    folder = folder_of(*cell, runs)
    if not (folder / "cell.json").exists():
        return
    index = results / "cells.json"
    known = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    told = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    told["costs"] = json.loads((folder / "costs.json").read_text(encoding="utf-8"))
    if same_training(known.get(folder.name, {}), told):
        return  # trained again for its weights: what is known of it stays, with its times
    trace = replace(ExitTrace.load(folder / "trace.safetensors"), ids=None)
    trace.save(results / f"{folder.name}.safetensors", half=True)
    write_json(index, dict(sorted({**known, folder.name: told}.items())))


def same_training(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two trainings differ in nothing but how long they took."""
    return all(one.get(key) == other.get(key) for key in {*one, *other} - {"seconds", "samples_per_s"})


def _train(cell: Cell, options: argparse.Namespace, over: dict[Cell, threading.Event]) -> int:
    """The exit status of a training, which begins when the one that it goes on from is over."""
    task, name, seed = cell
    before = over.get((task, VARIANTS[name].after or "", seed))
    if before is not None:
        before.wait()
    try:
        return _trained(task, name, seed, options)
    finally:
        over[cell].set()


def _trained(task: str, name: str, seed: int, options: argparse.Namespace) -> int:
    log = options.runs / f"{task}-{name}-{seed}.log"
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [
        sys.executable, "-m", "experiments.beem.cells", task, name, str(seed), "--data", str(options.data),
        "--runs", str(options.runs), "--threads", str(options.threads),
    ]  # fmt: skip
    with open(log, "a", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode
    last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
    print(f"{task} {name} {seed}: {last[0] if last else ''} ({duration(time.perf_counter() - began)})", flush=True)
    return code


if __name__ == "__main__":
    main()
