"""The rows of a job on a user's own data: read, in three parts, and known again later."""

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, get_args, get_origin

import torch

from offramp.errors import DataError, FormatError
from offramp.preprocess import ImagePreprocess, NumberPreprocess, Preprocess
from offramp.sources import Columns, Labelled, Source, guess_columns, open_source, read_labelled, split_rows

__all__ = [
    "SPLITS", "Own", "absolute", "all_rows", "checker", "columns_of", "fingerprints", "in_order", "leaks",
    "part_called", "parts_of", "rows_of", "typical_size",
]  # fmt: skip

SPLITS = ("train", "calibrate", "test")
SHARES = (0.7, 0.15, 0.15)


@dataclass(frozen=True)
class Own:
    """A job in words that fit into run.json.

    Args:
        data: a file, folder or hub name.
        model: as for `load_network`.
        validation, test: files of their own for calibrating and testing; without them the data are split.
        text: columns that the network is fed; None guesses.
        label: the column that it is to say; None guesses.
        at: taps; None places them behind the network's blocks.
        every: behind each n-th block.
        head: of every exit; None is "projected" for texts and "auto" otherwise.
        tokenizer: a transformers folder or hub name, for texts and a network of the user's own.
        max_length: of texts, in tokens.
        image_size: (height, width); None takes the network's own, or 32.
        grey: one channel.
        encoding: of text files.
        skip_bad: leave out rows that cannot be used.
        epochs, limit, seed: as for `job`; the seed also decides the split.
        shares: of the rows to train, calibrate and test on, where the data have no such parts.
        classes: names, once they are known.
        fingerprints, rows: of each split, once they are known: a checksum, and how many.
    """

    data: str
    model: str
    validation: str | None = None
    test: str | None = None
    text: tuple[str, ...] | None = None
    label: str | None = None
    kind: str | None = None
    at: tuple[str, ...] | None = None
    every: int | None = None
    head: str | None = None
    tokenizer: str | None = None
    max_length: int = 128
    image_size: tuple[int, int] | None = None
    grey: bool = False
    encoding: str = "utf-8"
    skip_bad: bool = False
    epochs: int | None = None
    limit: int | None = None
    seed: int = 0
    shares: tuple[float | int, float | int, float | int] = SHARES
    classes: tuple[str, ...] = ()
    fingerprints: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Own":
        """The job of what `dataclasses.asdict` gave, back from JSON.

        Raises:
            FormatError: it is damaged.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, Mapping) or not {"data", "model"} <= set(fields) <= known:
            raise FormatError("the job of the run is damaged. Train again.")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        for field in dataclasses.fields(cls):
            if field.name in values and not _fits(values[field.name], field.type):
                told = repr(values[field.name])[:80]
                raise FormatError(f"the job of the run is damaged: {field.name} is {told}. Train again.")
        return cls(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a field is annotated with: plain types, tuples of them, and None."""
    inner = get_args(hint)
    if get_origin(hint) is not tuple:
        return any(_fits(value, part) for part in inner) if inner else type(value) is hint
    if not isinstance(value, tuple):
        return False
    if inner[-1] is Ellipsis:
        return all(_fits(part, inner[0]) for part in value)
    return len(value) == len(inner) and all(map(_fits, value, inner))


def rows_of(own: Own, split: str) -> Labelled:
    """The raw rows of a split of a run, read again.

    Raises:
        DataError: they are gone, or are not the ones that the run was trained with.
    """
    return part_called(all_rows(own), split)


def all_rows(own: Own) -> dict[str, Labelled]:
    """The rows of every split of a run, read again and known again by their checksums."""
    columns = columns_of(own)
    # what could not be read was left out, or there was no such row
    parts, _ = parts_of(own, columns, checker(columns) if own.skip_bad else None)
    parts = in_order(parts, own.classes)  # after the split, which draws class by class
    for split, new, old in zip(SPLITS, fingerprints(own, columns, parts), own.fingerprints, strict=False):
        if new != old:
            raise DataError(
                f"the {split} rows of {own.data} are not those that the run was trained with: the data have changed. "
                "Train again, or bring the old data back."
            )
    return dict(zip(SPLITS, parts, strict=True))


def absolute(place: str) -> str:
    """A path that is found from every folder; names of the hub as they are."""
    return str(Path(place).resolve()) if Path(place).exists() else place


def columns_of(own: Own) -> Columns:
    """The columns of the data, given or guessed.

    Raises:
        DataError: they cannot be read, or it is not clear which is which.
    """
    return guess_columns(open_source(own.data, encoding=own.encoding), text=own.text, label=own.label, kind=own.kind)


def checker(columns: Columns) -> Preprocess | None:
    """What says of a row whether it can be used; texts need nothing of that kind."""
    if columns.kind == "image":
        return ImagePreprocess((32, 32), column=columns.inputs[0])
    if columns.kind == "numbers":
        count = len(columns.inputs)
        return NumberPreprocess(columns.inputs, (0.0,) * count, (1.0,) * count)
    return None


def in_order(parts: Sequence[Labelled], known: Sequence[str] | None) -> list[Labelled]:
    """The parts with their classes in the order that the network learnt before, when it learnt the same ones."""
    classes = parts[0].classes
    places = {name.casefold(): place for place, name in enumerate(known or ())}
    if len(places) != len(classes) or set(places) != {name.casefold() for name in classes}:
        return list(parts)
    new = torch.tensor([places[name.casefold()] for name in classes])
    ordered = tuple(sorted(classes, key=lambda name: places[name.casefold()]))
    return [dataclasses.replace(part, labels=new[part.labels], classes=ordered) for part in parts]


def leaks(parts: Sequence[Labelled]) -> list[str]:
    """Notes about held-out rows that are also among the training rows, as they may be when files are given for each."""

    def key(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(value) for value in row.values() if not isinstance(value, bytes | Mapping))

    train = {key(row) for row in parts[0].rows} - {()}
    notes = []
    for split, part in zip(SPLITS[1:], parts[1:], strict=True):
        if same := sum(key(row) in train for row in part.rows):
            notes.append(f"{same} of the {len(part.rows)} {split} rows are also among the training rows: what they say "
                         "of new rows is too good")  # fmt: skip
    return notes


def fingerprints(own: Own, columns: Columns, parts: Sequence[Labelled]) -> tuple[str, ...]:
    """A checksum of the rows of each split; images by their place in the folder and their length."""

    def short(value: Any) -> Any:
        if not isinstance(value, str | Path) or not os.path.isfile(value):
            return value
        return f"{os.path.relpath(value, own.data)} {os.path.getsize(value)}"

    def named(part: Labelled) -> Labelled:
        if columns.kind != "image":
            return part
        return dataclasses.replace(part, rows=[{k: short(v) for k, v in row.items()} for row in part.rows])

    return tuple(named(part).fingerprint() for part in parts)


def parts_of(own: Own, columns: Columns, check: Preprocess | None) -> tuple[list[Labelled], list[str]]:
    """(rows for training, calibrating and testing, notes)."""
    source = open_source(own.data, encoding=own.encoding)
    given = {name: place for name, place in (("validation", own.validation), ("test", own.test)) if place}

    def read(src: Any, split: str | None, known: Sequence[str] | None) -> Labelled:
        return read_labelled(src, columns, split=split, classes=known, check=check, skip_bad=own.skip_bad)

    main = "train" if "train" in source.splits else None
    if not given and source.splits and main is None:
        raise DataError(f"{source.name} has {', '.join(source.splits)}, but no train. Give one of that name.")
    first = read(source, main, None)
    notes = list(first.notes)
    held: dict[str, Labelled] = {}
    for name in ("validation", "test"):
        if name in given:
            held[name] = read(open_source(given[name], encoding=own.encoding), None, first.classes)
        elif name in source.splits and not _labelled(source, name, columns.label, first.classes):
            notes.append(f"the {name} rows of {source.name} have no labels and are not used")
        elif name in source.splits:
            held[name] = read(source, name, first.classes)
        notes += held[name].notes if name in held else []
    if len(held) == 2:
        parts = [first, held["validation"], held["test"]]
    elif held:  # one is there: the training rows give the other
        ((name, other),) = held.items()
        share = own.shares[2 if name == "validation" else 1]
        rest, piece = split_rows(first, (1 - share, share), own.seed)
        parts = [rest, other, piece] if name == "validation" else [rest, piece, other]
    else:
        parts = split_rows(first, own.shares, own.seed)
    if own.limit is not None and own.limit < len(parts[0].rows):
        keep = torch.randperm(len(parts[0].rows), generator=torch.Generator().manual_seed(own.seed))[: own.limit]
        parts[0] = parts[0].select(keep.sort().values)
    return parts, notes


def _labelled(source: Source, split: str, label: str | None, classes: Sequence[str]) -> bool:
    """Whether one of the first rows of a split has a label; those of hidden tests are missing or -1."""
    none = {"", "None", "-1"} - set(classes)
    return any(label is None or str(row.get(label)).strip() not in none for row in source.head(50, split))


def part_called(parts: Mapping[str, Labelled], split: str) -> Labelled:
    """The part of that name.

    Raises:
        DataError: there is none.
    """
    if split not in parts:
        raise DataError(f"there is no split {split!r}; expected one of {', '.join(SPLITS)}.")
    return parts[split]


def typical_size(rows: Sequence[Mapping[str, Any]], column: str) -> tuple[int, int]:
    """A square about as large as the images are, from 16 to 224 pixels wide."""
    from PIL import Image

    sides = []
    for row in rows[:50]:
        value = row[column]
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            sides.append(min(image.size))
    side = max(16, min(224, int(median(sides))) // 4 * 4)
    return side, side
