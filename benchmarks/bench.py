"""Measured speed of every policy against the plain model on this machine: `make bench ARGS="runs/sst2 --data DATA"`.

Calibrates each family to half of the plain FLOPs on the held-out rows of a run, then times live runs and the plain
model in alternating rounds, with every exit visited and none taken beside them. Writes JSON with the machine.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from offramp.artefacts import write_json
from offramp.compare import CHOICES, calibrate_choice
from offramp.cost import Budget
from offramp.machine import machine_line
from offramp.measure import measure
from offramp.quickstart import quickstart, time_table
from offramp.record import record
from offramp.runs import load_run


def main() -> None:
    """Times the run named on the command line; without one, the digits (trained first if need be)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="runs/digits", type=Path, help="a run directory")
    parser.add_argument("--data", default=None, help="the folder of data sets, for tasks other than digits")
    parser.add_argument("--batch-sizes", default="1,8,32,128")
    parser.add_argument("--rows", default=256, type=int, help="rows per round, at least two batches")
    parser.add_argument("--seconds", default=60.0, type=float, help="about so long per batch size")
    parser.add_argument("--fraction", default=0.5, type=float, help="the budget, of the plain model's FLOPs")
    parser.add_argument("--threads", default=None, type=int, help="torch threads")
    parser.add_argument("--out", default=None, type=Path, help="JSON file; results/bench-TASK.json by default")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = tuple(int(size) for size in options.batch_sizes.split(","))
    print(f"about {len(sizes) * options.seconds / 60 + 2:.0f} minutes on {machine_line()}", file=sys.stderr)
    if not (options.run / "run.json").exists() and options.run == Path("runs/digits"):
        quickstart("digits", out=options.run)
    loaded = load_run(options.run, data=options.data)
    work, model, tokenizer = loaded[0], loaded[1], loaded[2]
    test = work.load(work.splits[2], tokenizer)
    trace = record(model, work.load(work.splits[1], tokenizer))
    steps = tuple(sorted({2**i for i in range(12) if 2**i <= max(sizes)} | set(sizes)))
    begin = time.perf_counter()
    costs = measure(model, test.batch(torch.arange(64)).inputs, batch_sizes=steps, seconds=3.0, rounds=25)
    print(f"stages measured in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    target = Budget(fraction=options.fraction)
    policies = {name: calibrate_choice(name, trace, costs, target).policy for name in CHOICES}
    speeds, unused = time_table(model, policies, test, costs, sizes, rows=options.rows, seconds=options.seconds)
    print(f"{'policy':<12} {'batch':>5} {'plain ms':>9} {'live ms':>9} {'speed-up':>9} {'promise':>8} {'kept':>6}")
    for speed in (*speeds, *unused):
        promise, kept = speed.promise or 0.0, speed.kept or 0.0
        print(
            f"{speed.policy:<12} {speed.batch_size:>5} {speed.plain_ms:>9.2f} {speed.policy_ms:>9.2f} "
            f"{speed.speedup:>8.2f}x {promise:>7.2f}x {100 * kept:>5.0f}%"
        )
    out = options.out or Path("results") / f"bench-{work.name}.json"
    rows = [{**vars(s), "kept": s.kept} for s in (*speeds, *unused)]
    write_json(out, {"task": work.name, "fraction": options.fraction, "machine": machine_line(), "speeds": rows})
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
