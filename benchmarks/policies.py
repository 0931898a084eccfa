"""How long calibration and comparison take: EENet's frontier, threshold families at scale, learned ones.

python benchmarks/policies.py            # about three minutes on two cores; writes results/bench-policies.json
"""

import argparse
import time
from pathlib import Path

import torch

from offramp import Budget, CostModel, ExitTrace
from offramp.artefacts import write_json
from offramp.calibrate import Calibrator
from offramp.choices import CHOICES
from offramp.compare import compare_pools
from offramp.machine import machine_line
from offramp.policies import EENet
from offramp.pools import thirds

LEARNED = ("eenet", "ztw", "jei-dnn", "stopping")
NEEDS_SIGNALS = ("berxit",)


def made(exits: int, rows: int, classes: int, seed: int = 0) -> ExitTrace:
    """Rows that later exits get right more often, some easier than others."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    ease = 3 * torch.rand(rows, generator=generator)
    depth = torch.linspace(0.6, 1.6, exits)[:, None, None]
    truth = torch.nn.functional.one_hot(labels, classes) * ease[:, None]
    shared = torch.randn(rows, classes, generator=generator)
    noise = torch.randn(exits, rows, classes, generator=generator)
    return ExitTrace(0.7 * shared + 0.6 * noise + depth * truth, labels)


def timed(name: str, call, table: list) -> None:
    began = time.perf_counter()
    call()
    table.append({"what": name, "seconds": time.perf_counter() - began})
    print(f"{name:70} {table[-1]['seconds']:7.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    table: list = []

    small, costs = made(6, 5000, 10), CostModel.from_costs([(k + 1) / 6 for k in range(6)])
    budgets = [Budget(fraction=1 / 6 + (1 - 1 / 6) * (i + 0.5) / 20) for i in range(20)]
    calibrator = Calibrator(EENet, small, costs)
    timed("EENet, 20 budgets, 5,000 rows x 6 exits x 10 classes", lambda: [calibrator.to(b) for b in budgets], table)

    large, costs = made(12, options.rows, 10), CostModel.from_costs([(k + 1) / 12 for k in range(12)])
    budgets = [Budget(fraction=1 / 12 + (1 - 1 / 12) * (i + 0.5) / 20) for i in range(20)]
    pool = thirds(large, (0.4, 0.3, 0.3))
    simple = [name for name in CHOICES if name not in (*LEARNED, *NEEDS_SIGNALS)]
    for names, what in ((simple, "threshold families"), (LEARNED, "learned families")):
        began = len(table)
        for name in names:
            timed(f"  {name}", lambda n=name: compare_pools([pool], large.rows, costs, budgets, [n]), table)
        total = sum(row["seconds"] for row in table[began:])
        table.append({"what": f"{what}, {options.rows} rows x 12 exits x 10 classes x 20 budgets", "seconds": total})
        print(f"{table[-1]['what']:70} {total:7.1f} s", flush=True)
    value = {"machine": machine_line(), "threads": torch.get_num_threads(), "times": table}
    write_json(Path("results") / "bench-policies.json", value)


if __name__ == "__main__":
    main()
