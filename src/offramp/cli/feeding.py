"""What `predict` answers: texts, images, lines and rows, from arguments, files and standard input, one at a time."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.errors import DataError

if TYPE_CHECKING:
    from offramp.preprocess import Preprocess

__all__ = ["Item", "items_of"]

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".ndjson", ".parquet", ".csv.gz", ".tsv.gz", ".jsonl.gz", ".json.gz")
LONGEST_LINE = 64 * 2**20  # bytes; a longer one is no row


@dataclass(frozen=True)
class Item:
    """One thing to answer: its number from 0, where it stands for messages, and its columns; or why it has none."""

    row: int
    where: str
    values: Mapping[str, Any] = field(default_factory=dict)
    bad: str | None = None


def items_of(
    given: Sequence[str], file: Path | None, preprocess: "Preprocess", *, encoding: str = "utf-8"
) -> Iterator[Item]:
    """The items, as they come; nothing is read further than it is asked for.

    Args:
        given: texts, or paths of images or tables, or "-".
        file: a table by its ending, a folder of images, or lines; "-" is standard input.
        preprocess: its columns are what a line of text stands for.

    Raises:
        DataError: a file does not exist or cannot be read.
    """
    if file is not None:
        return _of_file(file, preprocess, encoding)
    if list(given) == ["-"]:
        return _of_lines(Path("-"), preprocess, encoding)
    if len(given) == 1 and _is_table(Path(given[0])) and Path(given[0]).exists():
        return _of_file(Path(given[0]), preprocess, encoding)
    if preprocess.kind == "image":
        return _of_paths(given, preprocess)
    return (_of_text(row, f"text {row + 1}", text, preprocess) for row, text in enumerate(given))


def _is_table(path: Path) -> bool:
    return path.name.lower().endswith(TABLES)


def _of_file(path: Path, preprocess: "Preprocess", encoding: str) -> Iterator[Item]:
    if str(path) != "-" and not path.exists():
        raise DataError(f"{path} does not exist. Check the path.")
    if path.is_dir() or _is_table(path):
        return _of_table(path, preprocess, encoding)
    if preprocess.kind == "image" and str(path) != "-":
        return _of_paths([str(path)], preprocess)
    return _of_lines(path, preprocess, encoding)


def _of_table(path: Path, preprocess: "Preprocess", encoding: str) -> Iterator[Item]:
    from offramp.sources import open_source

    source = open_source(path, encoding=encoding)
    missing = [name for name in preprocess.columns if source.columns and name not in source.columns]
    if missing:
        raise DataError(
            f"{path} has no column {missing[0]!r}; it has {', '.join(map(repr, source.columns))}. "
            "The model was trained on that column: rename yours."
        )
    for row, (number, values) in enumerate(source.rows()):
        yield Item(row, source.where(number), values)


def _of_paths(paths: Sequence[str], preprocess: "Preprocess") -> Iterator[Item]:
    row = 0
    for name in paths:
        path = Path(name)
        if path.is_dir():
            for item in _of_table(path, preprocess, "utf-8"):
                yield Item(row, item.where, item.values, item.bad)
                row += 1
        else:
            bad = None if path.is_file() else f"{path} does not exist"
            yield Item(row, str(path), {preprocess.columns[0]: str(path), "file": str(path)}, bad)
            row += 1


def _of_lines(path: Path, preprocess: "Preprocess", encoding: str) -> Iterator[Item]:
    """The lines of a file or of standard input: JSON objects, or for a model of texts the texts themselves."""
    name = "standard input" if str(path) == "-" else str(path)
    file = sys.stdin.buffer if str(path) == "-" else open(path, "rb")  # noqa: SIM115  closed below
    try:
        row = number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            where = f"line {number} of {name}"
            if len(raw) > LONGEST_LINE:
                raise DataError(f"{where} is longer than {LONGEST_LINE // 2**20} MiB; expected one row a line.")
            try:
                text = raw.decode(encoding).removeprefix("\ufeff").rstrip("\r\n")
            except UnicodeDecodeError as error:
                bad = f"it is not {encoding} (byte {error.start + 1}: {error.reason}); give --encoding, or convert it"
                yield Item(row, where, bad=bad)
            else:
                yield _of_line(row, where, text, preprocess)
            row += 1
    finally:
        if file is not sys.stdin.buffer:
            file.close()


def _of_line(row: int, where: str, text: str, preprocess: "Preprocess") -> Item:
    if text.lstrip().startswith("{") or preprocess.kind != "text":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            if preprocess.kind == "text" and not _meant_as_json(text, preprocess):
                return _of_text(row, where, text, preprocess)
            return Item(row, where, bad=f"it is no JSON object ({error}); expected one row a line")
        if isinstance(values, dict):
            missing = [name for name in preprocess.columns if name not in values]
            if not missing:
                return Item(row, where, values)
            return Item(
                row, where, bad=f"it has no {missing[0]!r}; expected {', '.join(map(repr, preprocess.columns))}"
            )
        return Item(row, where, bad="it is no JSON object; expected one row a line")
    return _of_text(row, where, text, preprocess)


def _meant_as_json(text: str, preprocess: "Preprocess") -> bool:
    return any(f'"{name}"' in text for name in preprocess.columns)


def _of_text(row: int, where: str, text: str, preprocess: "Preprocess") -> Item:
    """A text alone; two have a tab between them."""
    if preprocess.kind != "text":
        expected = f"a JSON object with {', '.join(map(repr, preprocess.columns))}, or a file"
        return Item(row, where, bad=f"it is a text, and the model takes {preprocess.kind}; expected {expected}")
    columns = preprocess.columns
    parts = text.split("\t") if len(columns) > 1 else [text]
    if len(parts) != len(columns):
        return Item(row, where, bad=f"it has {len(parts)} part(s); expected {len(columns)} texts with a tab between")
    return Item(row, where, dict(zip(columns, parts, strict=True)))
