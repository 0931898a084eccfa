"""Small traces for the tests, from recorded runs: float16 logits and labels, no texts, images or names of rows.

python -m experiments.ours.traces runs/ag_news/test.safetensors runs/ag_news/costs.json --name ag_news
"""

import argparse
from dataclasses import replace
from pathlib import Path

from offramp import CostModel, ExitTrace

TRACES = Path(__file__).parents[2] / "tests" / "traces"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("costs", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--source", default="")
    options = parser.parse_args()
    trace = replace(ExitTrace.load(options.trace), ids=None, source=options.source)
    path = trace.save(TRACES / f"{options.name}.safetensors", half=True)
    costs = CostModel.load(options.costs)
    replace(costs, timed=(), machine="").save(TRACES / f"{options.name}-costs.json")
    print(f"{path}: {trace.exits} exits, {trace.rows} rows, {path.stat().st_size / 1000:.0f} kB, {trace.accuracy()}")


if __name__ == "__main__":
    main()
