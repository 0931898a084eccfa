"""Commands that run a network: quickstart, train, record, measure."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli.options import (
    BatchSizeOption,
    DataOption,
    DeviceOption,
    EngineOption,
    EpochsOption,
    JsonOption,
    LimitOption,
    PrecisionOption,
    RunArgument,
    SeedOption,
    Task,
    ThreadsOption,
    check_out,
    open_run,
    split_name,
    whole_numbers,
)
from offramp.cli.show import compared, is_first, is_quiet, line, note, percent, percents, result, table

if TYPE_CHECKING:
    from offramp.quickstart import QuickResult

__all__ = ["measure", "quickstart", "record"]

SplitOption = Annotated[
    str, typer.Option(help="Of the task's data, e.g. validation; calibrate is the one that the task calibrates on.")
]
TYPICAL = 64  # rows that are measured, repeated or cut to each batch size


def quickstart(
    task: Annotated[Task, typer.Option(help="What to learn.")] = Task.digits,
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option(help="Where files are left; runs/TASK by default.")] = None,
    epochs: EpochsOption = None,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    json_out: JsonOption = False,
) -> None:
    """Train a network with exits, calibrate policies to half its cost, and time them live on this machine."""
    folder = check_out(out if out is not None else Path("runs") / task.value, folder=True)
    from offramp.quickstart import quickstart as run

    found = run(task.value, data=data, out=folder, epochs=epochs, limit=limit, seed=seed, progress=not is_quiet())
    if json_out:
        result(found.to_dict(), (), True)
    else:
        _show_quickstart(found, folder)


def record(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option(help="The trace to write, .safetensors; RUN/SPLIT.safetensors by default.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Of the run's data; by default those that it calibrates on and tests on, one after the other."
        ),
    ] = None,
    data: DataOption = None,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    engine: EngineOption = "eager",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json_out: JsonOption = False,
) -> None:
    """Record what every exit says about every row of a split; calibrate and compare work on that."""
    if out is not None and split is None:
        split = "calibrate"
    from offramp.runs import trace_path

    check_out(out if out is not None else trace_path(run, "any")) if run.is_dir() else None
    work, model, tokenizer = open_run(run, data, device)
    from offramp.engines import engine as engine_of
    from offramp.record import record as run_record

    own = engine == "eager" and precision is None and threads is None
    runs = None if own else engine_of(model, engine, precision=precision, threads=threads)
    names = tuple(dict.fromkeys(work.splits[1:])) if split is None else (split_name(work, split),)
    written = []
    for name in names:
        trace = run_record(
            model, work.load(name, tokenizer), batch_size=batch_size, progress=not is_quiet(), engine=runs
        )
        trace = dataclasses.replace(trace, source=f"{work.name} {name}")
        path = out or trace_path(run, name)
        if is_first():
            trace.save(path)
        written.append((path, trace))
    values = [
        {"out": str(path), "source": trace.source, "exits": trace.exits, "rows": trace.rows,
         "accuracy": trace.accuracy()}
        for path, trace in written
    ]  # fmt: skip
    lines = []
    for path, trace in written:
        accuracy = ", ".join(map(percent, trace.accuracy()))
        lines += [f"{trace.rows} rows of {trace.source}, {trace.exits} exits: {accuracy}", f"wrote {path}"]
    result(values[0] if len(values) == 1 else {"traces": values}, lines, json_out)


def measure(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="The costs to write; RUN/costs.json by default.")] = None,
    batch_sizes: Annotated[str, typer.Option(help="Sizes to time; those in between are interpolated.")] = (
        "1,2,4,8,16,32,64,128"
    ),
    split: SplitOption = "calibrate",
    data: DataOption = None,
    device: DeviceOption = "auto",
    engine: EngineOption = "eager",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json_out: JsonOption = False,
) -> None:
    """Count the FLOPs and time every stage, head, step and regrouping on this machine, on typical rows of a split."""
    sizes = whole_numbers(batch_sizes, "--batch-sizes")
    from offramp.runs import costs_path

    out = out or costs_path(run)
    check_out(out) if run.is_dir() else None
    work, model, tokenizer = open_run(run, data, device)
    from offramp.engines import engine as engine_of
    from offramp.loaders import as_loader
    from offramp.measure import measure as run_measure
    from offramp.record import to_device

    rows = work.load(split_name(work, split), tokenizer)
    typical = next(iter(as_loader(rows, min(len(rows), TYPICAL)))).inputs
    runs = engine_of(model, engine, precision=precision, threads=threads)
    note(f"timing {work.name} with {runs.name} {runs.precision} at batch sizes {', '.join(map(str, sizes))} ...")
    costs = run_measure(model, to_device(typical, next(model.parameters()).device), batch_sizes=sizes, engine=runs)
    costs.save(out)
    if json_out:
        result({"out": str(out), **dataclasses.asdict(costs), "cumulative": costs.cumulative()}, (), True)
        return
    line(f"{(costs.plain_flops or 0) / 1e6:.1f} million FLOPs a row; on {costs.machine}")
    line("cost up to each exit, of the plain model: " + ", ".join(f"{c:.3f}" for c in costs.cumulative()))
    table(
        "Milliseconds a batch",
        ("rows", "plain", "stages", "heads", "step", "regrouping"),
        (
            (
                str(t.batch_size),
                _ms(t.plain_s),
                " ".join(map(_ms, t.stage_s)),
                " ".join(map(_ms, t.head_s[:-1])),
                _ms(t.step_s),
                " ".join(map(_ms, t.regroup_s[:-1])),
            )
            for t in costs.timed
        ),
    )
    line(f"wrote {out}")


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


def _show_quickstart(found: "QuickResult", folder: Path) -> None:
    """Nothing; the figures are on standard output as tables."""
    if found.note:
        note(f"note: {found.note}")
    line(f"{found.task}: trained in {found.train_s:.0f} s on {found.rows[0]} rows, calibrated on {found.rows[1]}, "
         f"tested on {found.rows[2]}")  # fmt: skip
    line("accuracy of each exit, the plain model last: " + ", ".join(map(percent, found.exits)))
    compared(found.table, "\nPolicies calibrated to half of the plain model's FLOPs (counted), on rows never seen")
    rows = [
        (
            speed.policy,
            str(speed.batch_size),
            f"{speed.plain_ms:.2f}",
            f"{speed.policy_ms:.2f}",
            f"{speed.spread_ms:.2f}",
            f"{speed.speedup:.2f}x{' does not pay' if speed.speedup < 1 and speed in found.speeds else ''}",
            "" if speed.promise is None else f"{speed.promise:.2f}x",
            "" if speed.kept is None else percent(speed.kept),
            percents(speed.shares),
        )
        for speed in sorted((*found.speeds, *found.unused), key=lambda speed: speed.batch_size)
    ]
    columns = ("policy", "batch", "plain ms", "live ms", "spread", "speed-up", "promise", "kept", "left at each exit")
    table("\nMeasured live against the same network without exits, taking turns; heads, policy, regrouping included",
          columns, rows)  # fmt: skip
    for name, (rows_compared, near, differ, _) in found.parity.items():
        line(f"{name}: {differ} of {rows_compared} live rows left at another exit than simulated "
             f"({near} rows so near a decision that rounding decides are not counted)")  # fmt: skip
    if found.speeds:
        # fast and wrong is no answer: a policy counts when its interval reaches the plain accuracy
        reaching = {row.family for row in found.table if row.high >= row.plain}
        reaching = reaching or {max(found.table, key=lambda row: row.accuracy).family}
        best = max((s for s in found.speeds if s.policy in reaching), key=lambda speed: speed.speedup)
        row = next(row for row in found.table if row.family == best.policy)
        line(f"\nBest: {best.policy} is {best.speedup:.2f} times as fast as the plain model at batch "
             f"{best.batch_size}, with {percent(row.accuracy)} right against {percent(row.plain)}.")  # fmt: skip
    line(f"timed on {found.machine}")
    fit, split = found.splits
    judge = f" --test {folder}/{split}.safetensors" if fit != split else ""  # else halves take turns
    line(f"files are in {folder}; try next:")
    line(f"  offramp compare {folder}/{fit}.safetensors{judge} --costs {folder}/costs.json --budgets 0.4:0.9:0.1")
    line(f"  offramp calibrate {folder} --policy beem-a --fraction 0.6")
    line(f"  offramp report {folder}")
    line(f"  offramp predict {folder} --split {split}")
