"""All trainings of BEEM's table and of the ablation, a few at a time, each in a process of its own. What is finished is
not trained again, what was stopped goes on.

    python experiments/beem/run.py --data DIR --list                # what there is to do, and about how long it takes
    python experiments/beem/run.py --data DIR --workers 2           # logs in runs/beem/*.log
    python experiments/beem/run.py --data DIR --only rte,mrpc       # some tasks
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cells import VARIANTS, epochs_of, folder_of

from offramp.meter import duration

SMALL = ("rte", "mrpc", "cola", "qnli")
TASKS = ("sst2", *SMALL)
ABLATION = tuple(name for name in VARIANTS if name.startswith("taught"))
JOINT = ("depth", "longer", "plain-first", "heads-after")
BEFORE = ("plain", "static-2", "static-3", "static-4")
BEST = "taught"  # what seeds 1 and 2 are trained with besides; the ablation says why
MINUTES = {"sst2": 12, "sst2-full": 40, "rte": 7, "mrpc": 9, "cola": 4, "qnli": 7}  # an epoch, one of two threads, here

Cell = tuple[str, str, int]


def plan() -> list[Cell]:
    """Every cell, the most telling first: networks without exits, which others begin with, recipes, then seeds."""
    cells = [("sst2", name, 0) for name in ("plain", "depth", "taught", "static-3")]
    cells += [("cola", name, 0) for name in ("plain", *ABLATION)] + [("sst2", name, 0) for name in ABLATION]
    cells += [(task, name, 0) for name in ("plain", "taught") for task in SMALL]
    cells += [(task, name, 0) for name in ("static-3", "depth", "static-2", "static-4") for task in TASKS]
    cells += [(task, name, 0) for name in ABLATION for task in ("qnli", "mrpc", "rte")]
    cells += [("sst2-full", name, 0) for name in ("plain", BEST, "static-3", "static-2", "static-4")]
    cells += [(task, name, seed) for seed in (1, 2) for name in ("plain", BEST, "static-3") for task in SMALL]
    cells += [(task, name, 0) for name in JOINT for task in TASKS]
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
    left = [cell for cell in wanted if not (folder_of(*cell, options.runs) / "cell.json").exists()]
    total = sum(map(minutes, left)) / options.workers
    print(
        f"{len(wanted)} trainings, {len(wanted) - len(left)} done; about {duration(60 * total)} for the others",
        flush=True,
    )
    if options.list:
        for cell in left:
            print(f"  {' '.join(map(str, cell))}: about {minutes(cell):.0f} min")
        return
    options.runs.mkdir(parents=True, exist_ok=True)
    failed = []
    with ThreadPoolExecutor(options.workers) as pool:
        for cell, code in zip(left, pool.map(lambda each: _train(each, options), left), strict=True):
            if code:
                failed.append(cell)
    if failed:
        raise SystemExit(
            f"failed: {', '.join(' '.join(map(str, cell)) for cell in failed)}; see the logs in {options.runs}"
        )


def _train(cell: Cell, options: argparse.Namespace) -> int:
    """The exit status of a training."""
    task, name, seed = cell
    log = options.runs / f"{task}-{name}-{seed}.log"
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [
        sys.executable, str(Path(__file__).parent / "cells.py"), task, name, str(seed), "--data", str(options.data),
        "--runs", str(options.runs), "--threads", str(options.threads),
    ]  # fmt: skip
    with open(log, "a", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode
    last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
    print(
        f"{' '.join(map(str, cell))}: {last[0] if last else ''} ({duration(time.perf_counter() - began)})", flush=True
    )
    return code


if __name__ == "__main__":
    main()
