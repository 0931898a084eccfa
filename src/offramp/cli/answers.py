"""Commands that answer: predict, for texts or a split, and inspect, for files."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.holds import holds
from offramp.cli.options import (
    BatchSizeOption,
    DataOption,
    DeviceOption,
    JsonOption,
    RunArgument,
    open_run,
    read_policy,
    split_name,
    usage,
)
from offramp.cli.show import line, note, percents, result
from offramp.errors import DataError

if TYPE_CHECKING:
    from offramp.data import Examples
    from offramp.jobs import Job
    from offramp.runtime import Runtime

__all__ = ["inspect", "predict", "token_rows"]


def predict(
    run: RunArgument,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts; - reads standard input.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="A file that `offramp calibrate` wrote.", show_default=False)
    ] = None,
    split: Annotated[str | None, typer.Option(help="Answer the rows of a split of the task's data.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Answer the lines of a file, one text each; - is standard input.")
    ] = None,
    data: DataOption = None,
    batch_size: BatchSizeOption = 32,
    device: DeviceOption = "auto",
    json_out: JsonOption = False,
) -> None:
    """Answer texts, or a split, under a policy: one JSON object a line, with --json or without, in the rows' order.

    A text of a task about two texts has a tab between them. Lines are answered in batches as they come.
    """
    if policy is None:
        raise usage("--policy is missing; give a file that `offramp calibrate` wrote.")
    given = [name for name, value in (("TEXT", texts), ("--split", split), ("--file", file)) if value]
    if not given and not sys.stdin.isatty():
        given, file = ["--file"], Path("-")
    if len(given) != 1:
        raise usage(f"got {' and '.join(given) or 'none'} of TEXT, --split and --file; give exactly one.")
    chosen, _ = read_policy(policy)
    work, model, tokenizer = open_run(run, data, device)
    from offramp.runtime import Runtime

    answers = _Answers(Runtime(model, chosen), work)
    if split is not None:
        _answer_split(answers, work.load(split_name(work, split), tokenizer), batch_size)
    else:
        if tokenizer is None:
            raise DataError(f"{work.name} is about images, not texts. Give --split test or such.")
        from offramp.runs import read_run

        length = read_run(run)["options"].get("max_length", 128)
        source = nullcontext(texts) if texts and texts != ["-"] else _lines_of(file or Path("-"))
        with source as lines:
            _answer_texts(answers, lines or (), tokenizer, length, batch_size)
    answers.finish()


def inspect(
    path: Annotated[Path, typer.Argument(help="A run, trace, costs or policy.")], json_out: JsonOption = False
) -> None:
    """Say in a few lines what a file or a run holds."""
    value = holds(path)
    result(value, (f"{name}: {_plain(what)}" for name, what in value.items()), json_out)


class _Answers:
    """Writes answers as JSON lines and counts them."""

    def __init__(self, runtime: "Runtime", work: "Job") -> None:
        self.runtime, self.names, self.task = runtime, work.labels, work.name
        self.left = [0] * runtime.model.exits
        self.right = self.judged = self.cut = self.max_length = 0

    def write(self, inputs: Any, extra: Sequence[dict[str, Any]]) -> None:
        """Nothing; one line per row is on standard output, `extra[i]` among its keys."""
        from offramp.record import to_device

        said = self.runtime(to_device(inputs, next(self.runtime.model.parameters()).device))
        columns = (
            said.label.tolist(),
            said.probabilities.max(dim=-1).values.tolist(),
            said.exit.tolist(),
            said.score.tolist(),
        )
        for label, probability, exit_, score, more in zip(*columns, extra, strict=True):
            self.left[exit_] += 1
            answer = {
                "label": self.names[label],
                "probability": round(probability, 6),
                "exit": exit_,
                "score": round(score, 6),
            }
            line(json.dumps({**answer, **more}, ensure_ascii=False))
            if "truth" in more:
                self.judged += 1
                self.right += more["truth"] == answer["label"]
            self.cut += bool(more.get("truncated"))
        sys.stdout.flush()

    def finish(self) -> None:
        """Nothing; a summary is on standard error."""
        rows = sum(self.left)
        if not rows:
            note("there was nothing to answer: no lines came.")
            return
        note(f"{rows} rows, left at each exit: {percents(n / rows for n in self.left)}")
        if self.judged:
            note(f"{self.right} of {self.judged} are right ({100 * self.right / self.judged:.1f} %)")
        if self.cut:
            note(f"note: {self.cut} of {rows} texts were cut at {self.max_length} tokens; they say truncated.")


def _answer_split(answers: _Answers, rows: "Examples", batch_size: int) -> None:
    import torch

    for begin in range(0, len(rows), batch_size):
        index = torch.arange(begin, min(begin + batch_size, len(rows)))
        batch = rows.batch(index)
        truths = [None] * len(index) if batch.labels is None else batch.labels.tolist()
        extra = [
            {"row": row} if truth is None else {"row": row, "truth": answers.names[truth]}
            for row, truth in zip(index.tolist(), truths, strict=True)
        ]
        answers.write(batch.inputs, extra)


def _answer_texts(answers: _Answers, texts: Iterable[str], tokenizer: Any, max_length: int, batch_size: int) -> None:
    import torch

    from offramp.tasks import TEXT_TASKS

    columns = len(TEXT_TASKS[answers.task][0])
    answers.max_length = max_length
    source = iter(texts)
    row = 0
    while chunk := list(islice(source, batch_size)):
        rows, cut = token_rows(chunk, tokenizer, max_length, columns, first=row + 1)
        extra = [{"row": row + i} | ({"truncated": True} if i in cut else {}) for i in range(len(chunk))]
        answers.write(rows.batch(torch.arange(len(rows))).inputs, extra)
        row += len(chunk)


def token_rows(
    texts: Sequence[str], tokenizer: Any, max_length: int, columns: int = 1, *, first: int = 1
) -> tuple["Examples", set[int]]:
    """(token rows, the places of those that were cut at `max_length` tokens).

    Args:
        columns: texts in each of `texts`, with tabs between them.
        first: the number of the first one, for messages.

    Raises:
        DataError: one has another number of tabs.
    """
    from offramp.data import Examples

    parts = [text.split("\t") if columns > 1 else [text] for text in texts]
    for place, part in enumerate(parts):
        if len(part) != columns:
            raise DataError(
                f"text {first + place} has {len(part)} part(s); this task takes {columns} texts with a tab between."
            )
    whole = tokenizer(*map(list, zip(*parts, strict=True)), truncation=False, verbose=False)
    cut = {place for place, ids in enumerate(whole["input_ids"]) if len(ids) > max_length}
    if cut:
        whole = tokenizer(*map(list, zip(*parts, strict=True)), truncation=True, max_length=max_length)
    return Examples(dict(whole), pad_id=tokenizer.pad_token_id or 0), cut


class _lines_of:
    """The lines of a file or of standard input as UTF-8, without their ends."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, "standard input" if str(path) == "-" else str(path)

    def __enter__(self) -> Iterator[str]:
        self.file = sys.stdin.buffer if str(self.path) == "-" else open(self.path, "rb")
        return self._lines()

    def __exit__(self, *_: object) -> None:
        if self.file is not sys.stdin.buffer:
            self.file.close()

    def _lines(self) -> Iterator[str]:
        for number, raw in enumerate(self.file, 1):
            try:
                yield raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"line {number} of {self.name} is not UTF-8 ({error.reason}). Convert it first."
                ) from None


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
