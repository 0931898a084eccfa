"""Rows with their classes as numbers, what was wrong with others, and how they are split."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.errors import DataError, ValueRangeError
from offramp.preprocess import Preprocess
from offramp.sources.base import Source
from offramp.sources.columns import Columns
from offramp.splits import stratified_split

__all__ = ["Bad", "Labelled", "balance", "read_labelled", "split_rows"]

MOST_CLASSES = 10_000
IMBALANCED = 3.0  # times as many rows in the largest class as in the smallest
SHOWN = 5


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used: where it stands, and why."""

    where: str
    why: str


@dataclass(frozen=True, eq=False)
class Labelled:
    """Rows in memory (paths of images, not the images), with their classes.

    Args:
        rows: the columns that a model is fed, and no others.
        labels: int64 [row], or None.
        classes: their names, by number.
        numbers: of the rows in the source.
        bad: what was left out.
        notes: for a person.
    """

    rows: list[Mapping[str, Any]]
    labels: Tensor | None
    classes: tuple[str, ...]
    numbers: list[int]
    bad: tuple[Bad, ...]
    notes: tuple[str, ...]

    def select(self, index: Tensor) -> "Labelled":
        """The rows of those indices, in that order."""
        places = index.tolist()
        return Labelled(
            [self.rows[i] for i in places],
            None if self.labels is None else self.labels[index],
            self.classes,
            [self.numbers[i] for i in places],
            (),
            (),
        )

    def fingerprint(self) -> str:
        """A checksum of the rows and their labels, by which a run knows its data again."""
        digest = hashlib.sha256()
        for i, row in enumerate(self.rows):
            label = None if self.labels is None else int(self.labels[i])
            digest.update(json.dumps([{k: _key(v) for k, v in row.items()}, label], sort_keys=True).encode())
        return digest.hexdigest()[:16]


def read_labelled(
    source: Source,
    columns: Columns,
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    check: Preprocess | None = None,
    skip_bad: bool = False,
) -> Labelled:
    """All rows of a split, with their classes.

    Args:
        classes: the names of the classes that a model knows; by default those that occur, sorted.
        check: also asked about every row, e.g. whether an image can be read.
        skip_bad: leave out the rows that cannot be used, and say so, instead of raising.

    Raises:
        DataError: a row cannot be used, or labels are no classes; the message names the first rows and the cure.
    """
    rows: list[Mapping[str, Any]] = []
    names, numbers, bad = [], [], []
    label = columns.label
    named = source.classes.get(label) if label is not None else None
    for number, row in source.rows(split):
        name, why = (None, None) if label is None else _class_name(row.get(label), label, named)
        kept = {column: row[column] for column in columns.inputs if column in row}
        if why is None:
            why = _wrong(kept, columns) if check is None else check.check(kept)
        if why is None and classes is not None and label is not None and name not in classes:
            known = ", ".join(map(repr, classes[:8]))
            why = f"its {label!r} is {name!r}, which the model does not know; it knows {known}"
        if why is not None:
            bad.append(Bad(source.where(number), why))
            continue
        rows.append(kept)
        names.append(name)
        numbers.append(number)
    if bad and not skip_bad:
        raise DataError(f"{_told(bad)} Mend them, or leave them out with --skip-bad.")
    if not rows:
        raise DataError(f"{source.name} has no rows that can be used. {_told(bad) if bad else 'It is empty.'}")
    notes = [f"left out: {_told(bad)}"] if bad else []
    if source.skipped:
        notes.append(f"{source.skipped} blank line(s) of {source.name} were passed over")
    if label is None:
        return Labelled(rows, None, tuple(classes or ()), numbers, tuple(bad), tuple(notes))
    texts = [str(name) for name in names]
    ordered = tuple(classes) if classes is not None else _classes(texts, source, label, named)
    places = {name: place for place, name in enumerate(ordered)}
    labels = torch.tensor([places[name] for name in texts], dtype=torch.int64)
    return Labelled(rows, labels, ordered, numbers, tuple(bad), tuple(notes))


def split_rows(found: Labelled, shares: Sequence[float | int] = (0.7, 0.15, 0.15), seed: int = 0) -> list[Labelled]:
    """Parts of the rows by share, each with about the same mix of classes; rows that are the same are in one part.

    Raises:
        DataError: a part would be empty, or the first would lack a class.
    """
    if found.labels is None:
        raise DataError("rows without labels cannot be split by class. Name the label: --label COLUMN.")
    first: dict[tuple[Any, ...], int] = {}
    group = torch.tensor([first.setdefault(_identity(row), i) for i, row in enumerate(found.rows)], dtype=torch.int64)
    heads = group.unique()
    parts = stratified_split(found.labels[heads], shares, seed)
    made = [found.select(torch.isin(group, heads[part]).nonzero().flatten()) for part in parts]
    counts = [len(part.rows) for part in made]
    if min(counts) == 0 or len(made[0].labels.unique()) < 2:  # type: ignore[union-attr]
        raise DataError(
            f"{len(found.rows)} rows are too few to train on, calibrate on and test on: the parts have {counts} rows. "
            "Give more rows, or files of your own with --validation and --test."
        )
    return made


def balance(labels: Tensor, classes: Sequence[str]) -> str:
    """One line that says how many rows each class has, and what to do when they differ much.

    Raises:
        ValueRangeError: there are no rows.
    """
    if not len(labels):
        raise ValueRangeError("there are no labels to count.")
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    order = sorted(range(len(classes)), key=lambda i: -counts[i])
    shown = ", ".join(f"{classes[i]} {100 * counts[i] / len(labels):.0f} % ({counts[i]})" for i in order[:6])
    more = f" and {len(order) - 6} more" if len(order) > 6 else ""
    text = f"{len(labels)} rows of {len(classes)} classes: {shown}{more}"
    low = min(counts)
    if low == 0:
        return f"{text}. {classes[order[-1]]} has no rows here."
    if max(counts) / low >= IMBALANCED:
        return f"{text}. They are imbalanced: accuracy says little of small classes; calibrate with --metric macro-f1."
    return text


def _class_name(value: Any, column: str, named: Sequence[str] | None) -> tuple[str | None, str | None]:
    """(the class's name, None), or (None, why there is none)."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None, f"its {column!r} is missing"
    if isinstance(value, bool):
        return str(value).lower(), None
    if named is not None and isinstance(value, int):
        if 0 <= value < len(named):
            return named[value], None
        return None, f"its {column!r} is {value}, which stands for no class"
    if isinstance(value, float) and value.is_integer():
        return str(int(value)), None
    if not isinstance(value, str | int | float):
        return None, f"its {column!r} is a {type(value).__name__}; expected the name or the number of a class"
    text = str(value).strip()
    return (text, None) if text else (None, f"its {column!r} is empty")


def _wrong(row: Mapping[str, Any], columns: Columns) -> str | None:
    """Why a row cannot be used, as far as that shows without a preprocessing."""
    for name in columns.inputs:
        value = row.get(name)
        if value is None:
            return f"it has no {name!r}"
        if columns.kind == "text":
            if not isinstance(value, str):
                return f"its {name!r} is {type(value).__name__}; expected a text"
            if not value.strip():
                return f"its {name!r} is empty"
    return None


def _classes(texts: Sequence[str], source: Source, column: str, named: Sequence[str] | None) -> tuple[str, ...]:
    """The classes' names in their order.

    Raises:
        DataError: these are no classes.
    """
    if named is not None:
        return tuple(named)
    counts = Counter(texts)
    numbers = [_as_number(name) for name in counts]
    decimal = [name for name, number in zip(counts, numbers, strict=True) if number and not number.is_integer()]
    if None not in numbers and decimal:
        example = decimal[0]
        raise DataError(
            f"the labels in {column!r} of {source.name} are decimal numbers such as {example}; expected names or whole "
            "numbers of classes. Offramp classifies; put the numbers into classes first, or name another --label."
        )
    if len(counts) < 2:
        raise DataError(
            f"all {len(texts)} rows of {source.name} have the {column!r} {texts[0]!r}; expected two classes or more."
        )
    if len(counts) > MOST_CLASSES or (len(texts) >= 20 and len(counts) > len(texts) / 2):
        raise DataError(
            f"{column!r} of {source.name} has {len(counts)} different values in {len(texts)} rows, too many for "
            "classes. Name another --label."
        )
    if None not in numbers:
        return tuple(name for _, name in sorted(zip(numbers, counts, strict=True)))  # type: ignore[type-var]
    return tuple(sorted(counts))


def _as_number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _told(bad: Sequence[Bad]) -> str:
    shown = "; ".join(f"{one.where}: {one.why}" for one in bad[:SHOWN])
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return f"{len(bad)} row(s) cannot be used: {shown}{more}."


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(_key(value) for value in row.values())


def _key(value: Any) -> Any:
    """A value that is equal for equal cells and short: pictures by their checksum."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
