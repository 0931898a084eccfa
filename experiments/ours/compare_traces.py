"""Every policy on every committed trace: accuracy at cost with paired intervals against max-prob, over repeated halves.
Writes results/compare-NAME.json and the table in docs/policies.md.

    python -m experiments.ours.compare_traces                      # about 20 minutes on two cores
    python -m experiments.ours.compare_traces --names sst2,cola
"""

import argparse
import json
from pathlib import Path

import torch

from offramp import Budget, CostModel, ExitTrace
from offramp.artefacts import write_json
from offramp.choices import families_for
from offramp.cli.comparing import value_of
from offramp.compare import BASELINE, compare_pools
from offramp.meter import Meter
from offramp.pools import halves

TRACES = Path(__file__).parents[2] / "tests" / "traces"
RESULTS = Path(__file__).parents[2] / "results"
PAGE = Path(__file__).parents[2] / "docs" / "policies.md"
MARKS = ("<!-- measured: experiments/ours/compare_traces.py -->\n", "<!-- until here -->\n")
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def compared(name: str, repeats: int) -> dict:
    """What `offramp compare` gives for one trace."""
    trace, costs = ExitTrace.load(TRACES / f"{name}.safetensors"), CostModel.load(TRACES / f"{name}-costs.json")
    budgets = [Budget(fraction=b) for b in BUDGETS if b > costs.cumulative()[0]]
    pools, names = halves(trace, repeats), families_for(trace)
    with Meter(name, len(names) * len(pools), show=True) as meter:
        rows = compare_pools(pools, trace.rows, costs, budgets, names, progress=meter.advance)
    how = f"{name}: {repeats} times one half of {trace.rows} rows calibrates and the other judges, and back"
    return value_of(rows, pools, trace, costs, how)


def summary(values: dict[str, dict]) -> list[str]:
    """A markdown table: for every family and trace the mean difference to max-prob over the budgets that it can
    keep, and at how many the 95 % interval is above and below nothing."""
    families = list(dict.fromkeys(row["family"] for value in values.values() for row in value["families"]))
    lines = ["| policy | " + " | ".join(values) + " |", "|---|" + "---|" * len(values)]
    for family in families:
        if family == BASELINE:
            continue
        cells = []
        for value in values.values():
            mine = [r for r in value["rows"] if r["family"] == family and r["status"] != "infeasible"]
            if not mine:
                cells.append("")
                continue
            mean = sum(row["difference"] for row in mine) / len(mine)
            better = sum(row["difference_low"] > 0 for row in mine)
            worse = sum(row["difference_high"] < 0 for row in mine)
            cells.append(f"{100 * mean:+.2f} ({better}↑ {worse}↓ of {len(mine)})")
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", default=",".join(sorted(p.stem for p in TRACES.glob("*.safetensors"))))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for name in options.names.split(","):
        value = compared(name, options.repeats)
        for row in value["rows"]:
            row.pop("policy")
        write_json(RESULTS / f"compare-{name}.json", value)
    values = {p.stem[8:]: json.loads(p.read_text()) for p in sorted(RESULTS.glob("compare-*.json"))}
    lines = "\n".join(summary(values)) + "\n"
    print(lines)
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    PAGE.write_text(f"{before}{MARKS[0]}\n{lines}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
