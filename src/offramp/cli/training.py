"""`offramp train`: a named task, or a user's own data and network."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.options import (
    DataOption,
    EpochsOption,
    Gradients,
    JsonOption,
    LimitOption,
    Loss,
    SeedOption,
    Task,
    check_out,
    image_size,
    names_in,
    objective_of,
    usage,
)
from offramp.cli.show import is_first, is_quiet, note, percent, result

if TYPE_CHECKING:
    from offramp.jobs import Job
    from offramp.own import OwnJob
    from offramp.recipe import Recipe

__all__ = ["train"]


WhatArgument = Annotated[
    str,
    typer.Argument(
        metavar="TASK_OR_DATA",
        help="A named task, or your data: .csv, .tsv, .jsonl, .parquet, a folder of images or tables, a hub name.",
    ),
]
OutOption = Annotated[
    Path | None, typer.Option(help="The folder of the run; runs/TASK_OR_DATA by default.", show_default=False)
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="For your data: minilm, resnet20, resnet56, package.module:function, a transformers folder or name."
    ),
]
TextOption = Annotated[str | None, typer.Option(help="The column, or two, that the network is fed; guessed.")]
LabelOption = Annotated[str | None, typer.Option(help="The column that it is to say; guessed.")]
ValidationOption = Annotated[str | None, typer.Option(help="Rows to calibrate on, instead of a part of the data.")]
TestOption = Annotated[str | None, typer.Option(help="Rows to test on, instead of a part of the data.")]
AtOption = Annotated[str | None, typer.Option(help="Modules to put exits behind, with commas; found by default.")]
EveryOption = Annotated[int | None, typer.Option(min=1, help="An exit behind every n-th block of the network.")]
HeadOption = Annotated[
    str | None,
    typer.Option(help="auto, map, conv, first, mean, projected (the default for texts), attention, pooler or vector."),
]
TokenizerOption = Annotated[str | None, typer.Option(help="For texts and a network of your own: whose tokenizer.")]
ImageSizeOption = Annotated[
    str | None, typer.Option("--image-size", help="Of images: SIDE or HEIGHTxWIDTH, instead of the network's own.")
]
GreyOption = Annotated[bool, typer.Option("--grey", help="Images of one channel.")]
SkipBadOption = Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that cannot be used.")]
EncodingOption = Annotated[str, typer.Option(help="Of text files.")]
ObjectiveOption = Annotated[Loss | None, typer.Option(help="What to minimise, instead of the recipe's.")]
StepRowsOption = Annotated[int | None, typer.Option(min=1, help="Rows per step, instead of the recipe's.")]
RateOption = Annotated[float | None, typer.Option(help="The highest learning rate, instead of the recipe's.")]
HeadRateOption = Annotated[float | None, typer.Option("--head-lr", help="The same of the heads.")]
GradientsOption = Annotated[
    Gradients | None, typer.Option(help="How the gradients of exits meet in the network; added up by default.")
]
DecayOption = Annotated[
    float | None, typer.Option(help="Each part of the network learns at this times the rate of the next, e.g. 0.85.")
]
TeacherOption = Annotated[
    Path | None, typer.Option(metavar="RUN", help="A run on the same rows, whose last exit teaches all exits.")
]
LengthOption = Annotated[int, typer.Option(min=2, help="Tokens of a text; what is longer is cut.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show data, exits and cost, and train nothing.")]
ResumeOption = Annotated[bool, typer.Option(help="Go on from OUT/checkpoint if the training was stopped.")]


def train(
    what: WhatArgument,
    out: OutOption = None,
    model: ModelOption = None,
    text: TextOption = None,
    label: LabelOption = None,
    validation: ValidationOption = None,
    test: TestOption = None,
    at: AtOption = None,
    every: EveryOption = None,
    head: HeadOption = None,
    tokenizer: TokenizerOption = None,
    image_size_: ImageSizeOption = None,
    grey: GreyOption = False,
    skip_bad: SkipBadOption = False,
    encoding: EncodingOption = "utf-8",
    data: DataOption = None,
    epochs: EpochsOption = None,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    objective: ObjectiveOption = None,
    batch_size: StepRowsOption = None,
    lr: RateOption = None,
    head_lr: HeadRateOption = None,
    gradients: GradientsOption = None,
    layer_decay: DecayOption = None,
    teacher: TeacherOption = None,
    max_length: LengthOption = 128,
    dry_run: DryRunOption = False,
    resume: ResumeOption = True,
    json_out: JsonOption = False,
) -> None:
    """Train a network with all its exits. Given again after a stop, the command goes on where it was.

    Columns, classes and places of exits are found and shown, with the time and memory it will take, before it begins.
    """
    options: dict[str, Any] = {"epochs": epochs, "limit": limit, "max_length": max_length, "seed": seed}
    is_task = _is_task(what, {
        "--text": text, "--label": label, "--validation": validation, "--test": test, "--at": at, "--every": every,
        "--tokenizer": tokenizer, "--image-size": image_size_, "--model": model,
    })  # fmt: skip
    out = check_out(out or Path("runs") / (Path(what).name.partition(".")[0] or "own"), folder=True)
    if is_task:
        from offramp.jobs import job

        own, work = None, job(what, data=data, head=head, **options)
    else:
        from offramp.own import Own, prepare

        own = prepare(Own(
            data=what, model=str(model), validation=validation, test=test, text=names_in(text), label=label,
            at=names_in(at), every=every, head=head, tokenizer=tokenizer, image_size=image_size(image_size_),
            grey=grey, encoding=encoding, skip_bad=skip_bad, **options,
        ))  # fmt: skip
        work = own.job
        _show_own(own)
    changes = {"batch_size": batch_size, "lr": lr, "head_lr": head_lr, "layer_decay": layer_decay}
    work = _changed(work, objective, teacher, gradients, **changes)
    teach = None if teacher is None else lambda rows: _teacher(teacher, rows, data, work.recipe)
    _go(what, out, work, own, options, teach, dry_run=dry_run, resume=resume, json_out=json_out)


def _is_task(what: str, named: dict[str, Any]) -> bool:
    """Whether it is a named task and no data of the user's; options of the other kind are wrong usage."""
    tasks = [task.value for task in Task]
    if what in tasks:
        if given := [name for name, value in named.items() if value is not None]:
            raise usage(f"{given[0]} is for your own data; {what} is a named task.")
        return True
    if named["--model"] is None:
        raise usage(
            f"{what!r} is not one of the named tasks ({', '.join(tasks)}), so it is taken for your data: give the "
            "network with --model, e.g. --model minilm for texts, --model resnet20 for images"
        )
    return False


def _changed(
    work: "Job", objective: Loss | None, teacher: Path | None, gradients: Gradients | None, **given: Any
) -> "Job":
    """The job with what the options say instead of its recipe."""
    if teacher is not None and objective is None:
        objective = Loss.distill
    if (teacher is None) == (objective == Loss.distill):
        raise usage("--teacher RUN and --objective distill go together: one run teaches the other.")
    changed = {name: value for name, value in given.items() if value is not None}
    if gradients is not None:
        changed["gradients"] = gradients.value
    return dataclasses.replace(
        work,
        recipe=dataclasses.replace(work.recipe, **changed),
        objective=work.objective if objective is None else objective_of(objective),
    )


def _teacher(run: Path, rows: Any, data: Path | None, recipe: "Recipe") -> Any:
    """What the last exit of a run says about these training rows, or the run's model where every epoch changes them.

    Raises:
        DataError: the run was trained on other rows.
    """
    from offramp.data import Examples
    from offramp.errors import DataError
    from offramp.record import predict
    from offramp.runs import load_run

    work, model, tokenizer = load_run(run, data=data)
    seen = work.load(work.splits[0], tokenizer)  # as its own tokenizer has them
    same = len(seen) == len(rows) and seen.labels is not None and seen.labels.equal(rows.labels)
    if not same:
        raise DataError(
            f"{run} was trained on {len(seen)} rows and this is to learn from {len(rows)}, or they are others. A "
            "teacher has to be a run on the same rows, so with the same data, --limit and --seed."
        )
    if recipe.augment is not None or not isinstance(seen, Examples):
        return model
    note(f"asking {run} about {len(seen)} rows ...")
    return predict(model, seen)[0][-1]


def _go(
    what: str, out: Path, work: "Job", own: "OwnJob | None", options: dict[str, Any],
    teach: Callable[[Any], Any] | None, *, dry_run: bool, resume: bool, json_out: bool,
) -> None:  # fmt: skip
    """Nothing; the network was trained and the run is in the folder."""
    from offramp.estimate import estimate
    from offramp.runs import made_from, save_run
    from offramp.train import train as run

    network, tokenizer = work.build()
    rows, held_out = (work.load(split, tokenizer) for split in work.splits[:2])
    if own is not None or dry_run:
        takes = estimate(network, rows, objective=work.objective, recipe=work.recipe)
        note(f"training: {work.recipe.epochs} epoch{'s' * (work.recipe.epochs > 1)}, {takes}")
    if dry_run:
        result({"task": what, "rows": len(rows), "exits": network.exits, "taps": network.taps}, (), json_out)
        return
    report = run(
        network,
        rows,
        objective=work.objective,
        recipe=work.recipe,
        teacher=None if teach is None else teach(rows),
        validation=held_out,
        checkpoint=out / "checkpoint",
        resume=resume,
        progress=not is_quiet(),
    )
    if not is_first():
        return
    before = _weights_of(out)
    options = {**options, "head": work.head}
    save_run(out, what, options, network, report, objective=work.objective, recipe=work.recipe, own=own)
    if before not in (None, _weights_of(out)) and (old := made_from(out)):
        note(f"warning: {', '.join(path.name for path in old)} in {out} are of an earlier training; make them again.")
    if work.note:
        note(f"note: {work.note}")
    accuracy = f"exits on {work.splits[1]} rows: " + ", ".join(map(percent, report.accuracy or ()))
    result(
        {"run": str(out), "task": what, "rows": len(rows), "exits": network.exits, "report": report.to_dict()},
        (f"trained {work.name} on {len(rows)} rows in {report.seconds:.0f} s: loss {report.loss:.4f}", accuracy,
         f"wrote {out}; next: offramp record {out} && offramp measure {out}"),
        json_out,
    )  # fmt: skip


def _weights_of(folder: Path) -> str | None:
    """The checksum of the weights of a finished run, None when there is none."""
    from offramp.errors import FormatError
    from offramp.runs import read_run

    try:
        return read_run(folder)["weights_sha256"]
    except FormatError:
        return None


def _show_own(own: "OwnJob") -> None:
    """Nothing; what was found in the data and in the network is on standard error."""
    from offramp.cli.attaching import shares_of
    from offramp.sources import balance

    for why in own.columns.why:
        note(f"columns: {why}")
    train, calibrate, test = (part.labels for part in own.parts)
    note(f"classes: {balance(train, own.own.classes)}")  # type: ignore[arg-type]
    for text in own.notes:
        note(f"note: {text}")
    note(f"rows: {len(train)} to train on, {len(calibrate)} to calibrate on, {len(test)} to test on")  # type: ignore[arg-type]
    note(f"network: {own.own.model}; exits ({own.own.head} heads) behind {', '.join(own.model.taps)}")
    note(f"cost up to each exit, of the plain network's FLOPs: {shares_of(own.model)}")
