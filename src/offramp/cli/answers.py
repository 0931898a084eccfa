"""Commands that answer: predict, for texts, images, rows or a split, and inspect, for files."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.feeding import Item, items_of
from offramp.cli.holds import holds
from offramp.cli.opening import Opened, chosen, open_target
from offramp.cli.options import (
    BatchSizeOption,
    DataOption,
    DeviceOption,
    EngineOption,
    JsonOption,
    PartOption,
    PolicyOption,
    PrecisionOption,
    TargetArgument,
    ThreadsOption,
    split_name,
    usage,
)
from offramp.cli.show import line, note, percents, result
from offramp.errors import DataError

if TYPE_CHECKING:
    from offramp.runtime import Runtime

__all__ = ["inspect", "predict"]


def predict(
    target: TargetArgument,
    given: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT|FILE]...", help="Texts, images, or one table (.csv, .jsonl, ...); - is standard input."
        ),
    ] = None,
    policy: PolicyOption = None,
    fraction: PartOption = None,
    ms: Annotated[
        float | None, typer.Option(help="The policy that spends at most so many milliseconds a batch.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Answer the rows of a split of the run's data.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Answer a table, a folder of images, or lines; - is standard input.")
    ] = None,
    keep: Annotated[str | None, typer.Option(help="Columns to repeat in the answers, e.g. id,text.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Answer bad rows with an error and go on.")] = False,
    encoding: Annotated[str, typer.Option(help="Of text files and lines.")] = "utf-8",
    data: DataOption = None,
    batch_size: BatchSizeOption = 32,
    device: DeviceOption = "auto",
    engine: EngineOption = "eager",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json_out: JsonOption = False,
) -> None:
    """Answer rows under a policy: one JSON object a line, with --json or without, in the rows' order.

    Rows come from arguments, a file or standard input (texts, or JSON objects with the model's columns) and are
    answered in batches as they come, so that any number of them runs in little memory.
    """
    named = [name for name, value in (("TEXT", given), ("--split", split), ("--file", file)) if value]
    if not named and not sys.stdin.isatty():
        named, file = ["--file"], Path("-")
    if len(named) != 1:
        raise usage(f"got {' and '.join(named) or 'none'} of TEXT, --split and --file; give exactly one.")
    _known_encoding(encoding)
    opened = open_target(target, data, device)
    name, run = chosen(opened, policy, fraction, ms, batch_size, engine=engine, precision=precision, threads=threads)
    answers = _Answers(run, opened, name, tuple(filter(None, (keep or "").split(","))))
    if split is not None:
        _answer_split(answers, opened, split, batch_size)
    else:
        if opened.bundle.preprocess is None:
            raise DataError(f"{target} does not say how rows become inputs. Give --split test or such.")
        items = items_of(given or [], file, opened.bundle.preprocess, encoding=encoding)
        _answer_items(answers, items, batch_size, skip_bad)
    answers.finish()


def inspect(
    path: Annotated[Path, typer.Argument(help="A bundle, run, trace, costs, calibration, policy or report.")],
    json_out: JsonOption = False,
) -> None:
    """Say in a few lines what a file or a folder holds."""
    value = holds(path)
    result(value, (f"{name}: {_plain(what)}" for name, what in value.items()), json_out)


class _Answers:
    """Writes answers as JSON lines and counts them."""

    def __init__(self, runtime: "Runtime", opened: Opened, name: str, keep: tuple[str, ...]) -> None:
        self.runtime, self.opened, self.name, self.keep = runtime, opened, name, keep
        self.labels = opened.bundle.labels
        self.left = [0] * runtime.model.exits
        self.right = self.judged = self.cut = self.bad = 0

    def answered(self, inputs: Any, extra: Sequence[dict[str, Any]]) -> list[str]:
        """One line per row, `extra[i]` among its keys."""
        from offramp.record import to_device

        said = self.runtime(to_device(inputs, next(self.runtime.model.parameters()).device))
        columns = (
            said.label.tolist(),
            said.probabilities.max(dim=-1).values.tolist(),
            said.exit.tolist(),
            said.score.tolist(),
        )
        lines = []
        for label, probability, exit_, score, more in zip(*columns, extra, strict=True):
            self.left[exit_] += 1
            answer = {
                "label": self.labels[label],
                "probability": round(probability, 6),
                "exit": exit_,
                "score": round(score, 6),
            }
            lines.append(json.dumps({**answer, **more}, ensure_ascii=False, default=str))
            if "truth" in more:
                self.judged += 1
                self.right += more["truth"] == answer["label"]
            self.cut += bool(more.get("truncated"))
        return lines

    def refused(self, item: Item) -> str:
        """The line of a row that cannot be answered."""
        self.bad += 1
        return json.dumps({"row": item.row, "error": f"{item.where}: {item.bad}"}, ensure_ascii=False)

    def finish(self) -> None:
        """Nothing; a summary is on standard error."""
        rows = sum(self.left)
        if self.bad:
            note(f"warning: {self.bad} of {rows + self.bad} rows could not be answered; their lines say why.")
        if not rows:
            note("there was nothing to answer: no rows came." if not self.bad else "no row could be answered.")
            return
        note(f"{rows} rows under {self.name}, left at each exit: {percents(n / rows for n in self.left)}")
        if self.judged:
            note(f"{self.right} of {self.judged} are right ({100 * self.right / self.judged:.1f} %)")
        if self.cut:
            length = getattr(self.opened.bundle.preprocess, "max_length", 0)
            note(f"note: {self.cut} of {rows} texts were cut at {length} tokens; they say truncated.")


def _answer_split(answers: _Answers, opened: Opened, split: str, batch_size: int) -> None:
    from offramp.loaders import as_loader

    if opened.work is None:
        raise usage("--split is for runs; a bundle does not know where its data were. Give --file.")
    rows = opened.work.load(split_name(opened.work, split), opened.tokenizer)
    for batch in as_loader(rows, batch_size):
        truths = [None] * len(batch.rows) if batch.labels is None else batch.labels.tolist()
        extra = [
            {"row": row} if truth is None else {"row": row, "truth": answers.labels[truth]}
            for row, truth in zip(batch.rows.tolist(), truths, strict=True)
        ]
        _print(answers.answered(batch.inputs, extra))


def _answer_items(answers: _Answers, items: Iterator[Item], batch_size: int, skip_bad: bool) -> None:
    preprocess: Any = answers.opened.bundle.preprocess
    label = answers.opened.label
    while chunk := list(islice(items, batch_size)):
        checked = [_checked(item, preprocess) for item in chunk]
        good = [item for item in checked if item.bad is None]
        if not skip_bad and len(good) < len(checked):
            checked = checked[: next(i for i, item in enumerate(checked) if item.bad is not None) + 1]
            good = checked[:-1]  # what came before the bad row is answered
        lines: list[str] = []
        if good:
            rows = [item.values for item in good]
            extra = [_extra(item, label, answers) for item in good]
            for place in preprocess.truncated(rows) if preprocess.kind == "text" else ():
                extra[place]["truncated"] = True
            lines = answers.answered(preprocess.batch(rows), extra)
        told = iter(lines)
        _print(
            next(told) if item.bad is None else answers.refused(item)
            for item in checked
            if skip_bad or item.bad is None
        )
        if not skip_bad and len(good) < len(checked):
            bad = checked[-1]
            raise DataError(f"{bad.where}: {bad.bad}. Mend it, or give --skip-bad to answer the others.")


def _print(lines: Iterable[str]) -> None:
    """Nothing; the lines are on standard output, and a reader sees them now."""
    for text in lines:
        line(text)
    sys.stdout.flush()


def _checked(item: Item, preprocess: Any) -> Item:
    if item.bad is not None:
        return item
    why = preprocess.check(item.values)
    return item if why is None else Item(item.row, item.where, item.values, why.rstrip("."))


def _extra(item: Item, label: str | None, answers: _Answers) -> dict[str, Any]:
    found: dict[str, Any] = {"row": item.row}
    if label is not None and str(item.values.get(label, "")).strip() in answers.labels:
        found["truth"] = str(item.values[label]).strip()
    if "file" in item.values:
        found["file"] = item.values["file"]
    for name in answers.keep:
        if name not in item.values:
            raise DataError(f"{item.where} has no column {name!r} to keep; it has {', '.join(map(str, item.values))}.")
        found[name] = item.values[name]
    return found


def _known_encoding(encoding: str) -> None:
    import codecs

    try:
        codecs.lookup(encoding)
    except LookupError:
        raise usage(f"--encoding is {encoding!r}, which is unknown; expected utf-8, latin-1, cp1252, ...") from None


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
