"""Commands that run a network: quickstart, train, record, measure."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.options import (
    BatchSizeOption,
    DataOption,
    DeviceOption,
    EpochsOption,
    JsonOption,
    LimitOption,
    Loss,
    RunArgument,
    SeedOption,
    Task,
    check_out,
    open_run,
    split_name,
    whole_numbers,
)
from offramp.cli.show import compared, line, note, percent, percents, result, table

if TYPE_CHECKING:
    from offramp.objectives import Objective
    from offramp.quickstart import QuickResult

__all__ = ["measure", "objective_of", "quickstart", "record", "train"]

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

    found = run(task.value, data=data, out=folder, epochs=epochs, limit=limit, seed=seed)
    if json_out:
        result(found.to_dict(), (), True)
    else:
        _show_quickstart(found, folder)


def train(
    task: Annotated[Task, typer.Argument(help="What to learn.")],
    out: Annotated[Path, typer.Option(help="The folder of the run.")],
    data: DataOption = None,
    epochs: EpochsOption = None,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    objective: Annotated[Loss | None, typer.Option(help="What to minimise, instead of the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows per step, instead of the recipe's.")] = None,
    lr: Annotated[float | None, typer.Option(help="The highest learning rate, instead of the recipe's.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a text; what is longer is cut.")] = 128,
    resume: Annotated[bool, typer.Option(help="Go on from OUT/checkpoint if the training was stopped.")] = True,
    json_out: JsonOption = False,
) -> None:
    """Train a task's network with all its exits. Given again after a stop, the command goes on where it was."""
    check_out(out, folder=True)
    from offramp.jobs import job
    from offramp.runs import save_run
    from offramp.train import train as run

    options: dict[str, Any] = {"epochs": epochs, "limit": limit, "max_length": max_length, "seed": seed}
    work = job(task.value, data=data, **options)
    changed: dict[str, Any] = {
        name: value for name, value in (("batch_size", batch_size), ("lr", lr)) if value is not None
    }
    recipe = dataclasses.replace(work.recipe, **changed)
    chosen = work.objective if objective is None else objective_of(objective)
    model, tokenizer = work.build()
    rows, validation = (work.load(split, tokenizer) for split in work.splits[:2])
    report = run(
        model,
        rows,
        objective=chosen,
        recipe=recipe,
        validation=validation,
        checkpoint=out / "checkpoint",
        resume=resume,
    )
    save_run(out, task.value, options, model, report, objective=chosen, recipe=recipe)
    if work.note:
        note(f"note: {work.note}")
    held_out = f"exits on {work.splits[1]} rows: " + ", ".join(map(percent, report.accuracy or ()))
    result(
        {"run": str(out), "task": task.value, "rows": len(rows), "exits": model.exits, "report": report.to_dict()},
        (f"trained {task.value} on {len(rows)} rows in {report.seconds:.0f} s: loss {report.loss:.4f}", held_out,
         f"wrote {out}"),
        json_out,
    )  # fmt: skip


def record(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="The trace to write, .safetensors.")],
    split: SplitOption = "calibrate",
    data: DataOption = None,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    json_out: JsonOption = False,
) -> None:
    """Record what every exit says about every row of a split; calibrate and compare work on that."""
    check_out(out)
    work, model, tokenizer = open_run(run, data, device)
    from offramp.record import record as run_record

    name = split_name(work, split)
    trace = run_record(model, work.load(name, tokenizer), batch_size=batch_size)
    trace = dataclasses.replace(trace, source=f"{work.name} {name}")
    trace.save(out)
    accuracy = trace.accuracy()
    result(
        {"out": str(out), "source": trace.source, "exits": trace.exits, "rows": trace.rows, "accuracy": accuracy},
        (
            f"{trace.rows} rows of {trace.source}, {trace.exits} exits: " + ", ".join(map(percent, accuracy)),
            f"wrote {out}",
        ),
        json_out,
    )


def measure(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="The costs to write, .json.")],
    batch_sizes: Annotated[str, typer.Option(help="Sizes to time; those in between are interpolated.")] = (
        "1,2,4,8,16,32,64,128"
    ),
    split: SplitOption = "calibrate",
    data: DataOption = None,
    device: DeviceOption = "auto",
    json_out: JsonOption = False,
) -> None:
    """Count the FLOPs and time every stage and head on this machine, on typical rows of a split."""
    sizes = whole_numbers(batch_sizes, "--batch-sizes")
    check_out(out)
    work, model, tokenizer = open_run(run, data, device)
    import torch

    from offramp.measure import measure as run_measure
    from offramp.record import to_device

    rows = work.load(split_name(work, split), tokenizer)
    typical = rows.batch(torch.arange(min(len(rows), TYPICAL))).inputs
    note(f"timing {work.name} at batch sizes {', '.join(map(str, sizes))} ...")
    costs = run_measure(model, to_device(typical, next(model.parameters()).device), batch_sizes=sizes)
    costs.save(out)
    if json_out:
        result({"out": str(out), **dataclasses.asdict(costs), "cumulative": costs.cumulative()}, (), True)
        return
    line(f"{(costs.plain_flops or 0) / 1e6:.1f} million FLOPs a row; on {costs.machine}")
    line("cost up to each exit, of the plain model: " + ", ".join(f"{c:.3f}" for c in costs.cumulative()))
    table(
        "Milliseconds a batch",
        ("rows", "plain", "stages", "heads"),
        (
            (str(t.batch_size), _ms(t.plain_s), " ".join(map(_ms, t.stage_s)), " ".join(map(_ms, t.head_s[:-1])))
            for t in costs.timed
        ),
    )
    line(f"wrote {out}")


def objective_of(loss: Loss) -> "Objective":
    """The objective that a name on the command line stands for."""
    from offramp import objectives as o

    made: dict[Loss, Objective] = {
        Loss.depth: o.DepthWeighted(),
        Loss.uniform: o.Uniform(),
        Loss.eenet: o.EENetLoss(),
        Loss.self_distill: o.SelfDistill(),
        Loss.final_only: o.FinalOnly(),
        Loss.two_stage: o.TwoStage(),
    }
    return made[loss]


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
    for name, (rows_compared, near, differ) in found.parity.items():
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
    line(f"  offramp calibrate {folder}/{fit}.safetensors --costs {folder}/costs.json --policy beem-a "
         f"--fraction 0.6 --out {folder}/beem.json")  # fmt: skip
    line(f"  offramp predict {folder} --policy {folder}/beem.json --split {split}")
