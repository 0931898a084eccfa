"""Do engines decide as the simulator does, and what does a precision cost each exit? Writes results/*-parity.json.

    python -m experiments.ours.engines runs/sst2 --data DATA          # about 30 minutes on two cores

For every engine and precision: its own logits are recorded, every family is calibrated on half of the rows to half of
the plain model's FLOPs, and the other half runs live at several batch sizes. A row counts as near when a score lies so
near its threshold, or two logits so near each other, that rounding decides: 1e-5 in fp32 and int8, 0.01 in bf16, whose
products round differently with the size of the batch.
"""

import argparse
from pathlib import Path

import torch

from offramp import Budget, engine, measure, record
from offramp.artefacts import write_json
from offramp.choices import calibrate_choice, families_for
from offramp.data import Examples
from offramp.errors import OfframpError
from offramp.machine import machine_line
from offramp.meter import Meter
from offramp.quickstart import parity
from offramp.runs import load_run
from offramp.splits import stratified_split

PAIRS = (
    "eager:fp32", "compiled:fp32", "onnx:fp32", "onnx-file:fp32", "onnx:int8", "onnx-file:int8", "eager:bf16",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", default=None)
    parser.add_argument("--engines", default=",".join(PAIRS))
    parser.add_argument("--batch-sizes", default="1,7,64")
    parser.add_argument("--rows", type=int, default=400, help="to run live")
    options = parser.parse_args()
    work, model, tokenizer = load_run(options.run, data=options.data)[:3]
    model.eval()
    rows = work.load(work.splits[2], tokenizer)
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    costs = measure(model, rows.batch(torch.arange(64)).inputs, batch_sizes=())
    fit_rows, test_rows = stratified_split(rows.labels, (0.5, 0.5), seed=0)
    fit, test = rows.select(fit_rows), rows.select(test_rows[: options.rows])
    table, exits = [], {}
    pairs = options.engines.split(",")
    with Meter("engines", len(pairs), show=True) as meter:
        for pair in pairs:
            name, precision = pair.split(":")
            try:
                found = engine(model, name, precision=precision)
            except OfframpError as error:
                meter.line(f"{pair}: {error}")
                meter.advance()
                continue
            exits.setdefault(precision, exits_of(model, rows, found))
            trace = record(model, fit, engine=found, progress=False)
            policies = {
                family: calibrate_choice(family, trace, costs, Budget(fraction=0.5)).policy
                for family in families_for(trace)
            }
            tolerance = 1e-2 if precision == "bf16" else 1e-5
            for family, counts in parity(
                model, policies, test, costs, sizes, engine=found, tolerance=tolerance
            ).items():
                row = dict(zip(("compared", "near", "differ", "near_differ"), counts, strict=True))
                table.append({"engine": pair, "family": family, "batch_sizes": sizes, **row})
            mine = [row for row in table if row["engine"] == pair]
            meter.line(
                f"{pair}: {len(mine)} policies, {sum(row['compared'] for row in mine)} rows, "
                f"{sum(row['near'] for row in mine)} near of which {sum(row['near_differ'] for row in mine)} differ, "
                f"{sum(row['differ'] for row in mine)} others differ"
            )
            meter.advance()
    out = Path("results") / f"engines-{work.name}-parity.json"
    write_json(out, {"task": work.name, "machine": machine_line(), "parity": table, "accuracy_per_exit": exits})
    print(f"wrote {out}")


def exits_of(model: torch.nn.Module, rows: Examples, found: object) -> list[float]:
    """The accuracy of every exit on all rows, in an engine's arithmetic."""
    return list(record(model, rows, engine=found, progress=False).accuracy())


if __name__ == "__main__":
    main()
