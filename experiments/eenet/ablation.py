"""How much each term of EENet's objective, each form of its scorer and each feature matters, and how near its budgets
it comes: on recorded traces, repeated halves. Writes results/eenet-NAME.json.

    python -m experiments.eenet.ablation tests/traces/sst2.safetensors --costs tests/traces/sst2-costs.json --name sst2
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from offramp import Budget, CostModel, ExitTrace, calibrate
from offramp.artefacts import write_json
from offramp.calibrate import EENetFit
from offramp.meter import Meter
from offramp.policies import EENet
from offramp.pools import halves
from offramp.sweep import Sweep

WHOLE = EENetFit()
VARIANTS = {
    "as it is": WHOLE,
    "no KL of shares to scores": replace(WHOLE, weight_ce=0.0),
    "no cost term": replace(WHOLE, weight_cost=0.0),
    "neither": replace(WHOLE, weight_ce=0.0, weight_cost=0.0),
    "no fit at all (max-prob, even shares)": replace(WHOLE, steps=1, lr=1e-9, weight_ce=0.0, weight_cost=0.0),
    "with votes": replace(WHOLE, votes=True),
    "without class scores": replace(WHOLE, class_scores=False),
    "mlp": replace(WHOLE, scorer="mlp"),
    "mlp without class scores, with votes": replace(WHOLE, scorer="mlp", class_scores=False, votes=True),
    "cost term x 10": replace(WHOLE, weight_cost=0.1),
    "KL x 10": replace(WHOLE, weight_ce=1e-2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--costs", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budgets", default="0.4,0.6,0.8")
    options = parser.parse_args()
    trace, costs = ExitTrace.load(options.trace), CostModel.load(options.costs)
    budgets = [float(b) for b in options.budgets.split(",")]
    pools, table = halves(trace, options.repeats), []
    with Meter("fitting", len(VARIANTS) * len(pools), show=True) as meter:
        for name, fit in VARIANTS.items():
            right: list[list[float]] = [[] for _ in budgets]
            for pool in pools:
                sweep = Sweep(pool.test, costs)
                for place, budget in enumerate(budgets):
                    made = calibrate(EENet, pool.fit, costs, Budget(fraction=budget), fit=fit)
                    said = sweep(made.policy).said
                    right[place].append(float((said == pool.test.labels).double().mean()))
                meter.advance()
            means = [sum(r) / len(r) for r in right]
            table.append({"variant": name, "accuracy": means})
            print(f"{name:40}", " ".join(f"{100 * m:6.2f}" for m in means), flush=True)
    least, used, began = costs.cumulative()[0], [], time.perf_counter()
    for step in range(20):
        budget = least + (0.98 - least) * (step + 1) / 21
        made = calibrate(EENet, trace, costs, Budget(fraction=budget))
        used.append({"budget": budget, "achieved": made.achieved, "status": made.status})
    took = time.perf_counter() - began
    shares = [one["achieved"] / one["budget"] for one in used]
    print(f"20 budgets on {trace.rows} rows: {min(shares):.4f} to {max(shares):.4f} of the budget, {took:.1f} s")
    value = {"trace": str(options.trace), "budgets": budgets, "variants": table, "budget_errors": used, "seconds": took}
    write_json(Path("results") / f"eenet-{options.name}.json", {**value, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
