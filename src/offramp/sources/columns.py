"""Which columns hold the texts, images or numbers, and which one the label: guessed, and said."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from offramp.errors import DataError
from offramp.sources.base import Source

__all__ = ["Columns", "guess_columns"]

LABELS = ("label", "labels", "class", "target", "category", "sentiment", "y", "intent", "topic", "classification")
TEXTS = ("text", "sentence", "review", "content", "comment", "description", "message", "body", "document", "tweet")
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("question", "answer"),
         ("question1", "question2"), ("text1", "text2"), ("query", "document"))  # fmt: skip
IMAGES = ("image", "img", "picture", "photo", "file", "path", "file_name", "filename")
IDS = ("id", "idx", "index", "row", "guid", "uuid", "file")
HEAD = 500
MOSTLY = 0.9  # of the cells of a column that was named
WORDS_OF_TEXT = 2.5  # words in the mean cell from which a column is taken for text


@dataclass(frozen=True)
class Columns:
    """What a model is fed and what it is to say.

    Args:
        kind: "text", "image" or "numbers".
        inputs: the columns that it is fed.
        label: the column that it is to say, or None.
        why: sentences for a person.
    """

    kind: str
    inputs: tuple[str, ...]
    label: str | None
    why: tuple[str, ...]


def guess_columns(
    source: Source,
    *,
    text: Sequence[str] | None = None,
    label: str | None = None,
    kind: str | None = None,
    labelled: bool = True,
) -> Columns:
    """The columns of a source, by their names and by what its first rows hold.

    Args:
        text: columns that the model is fed, instead of a guess (texts, images or numbers alike).
        label: the column that it is to say, instead of a guess.
        kind: "text", "image" or "numbers", instead of a guess.
        labelled: whether there must be a label.

    Raises:
        DataError: a named column does not exist, or nothing can be guessed.
    """
    rows = source.head(HEAD)
    if not rows:
        raise DataError(f"{source.name} has no rows. Give at least one.")
    names = tuple(source.columns) or tuple(rows[0])
    for name in (*(text or ()), *(() if label is None else (label,))):
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{source.name} has no column {name!r}; it has {_list(names)}.{hint}")
    why = []
    if label is None:
        label, reason = _guess_label(names, rows, source, text or ())
        if label is None and labelled:
            raise DataError(
                f"{source.name} has {_list(names)}, none of them clearly a label. Say which: --label COLUMN."
            )
        why += [reason] if label is not None else []
    rest = [name for name in names if name != label]
    if text:
        inputs: tuple[str, ...] = tuple(text)
        found = kind or _kind_of(inputs, rows)
    else:
        found, inputs, reason = _guess_inputs(rest, rows, source, kind)
        why.append(reason)
    return Columns(found, inputs, label, tuple(why))


def _guess_label(
    names: Sequence[str], rows: Sequence[Mapping[str, Any]], source: Source, taken: Sequence[str]
) -> tuple[str | None, str]:
    free = [name for name in names if name not in taken]
    called = [name for word in LABELS for name in free if name.lower() == word]
    if called:
        return called[0], f"{called[0]!r} is the label, by its name"
    described = [name for name in free if name in source.classes]
    if len(described) == 1:
        return described[0], f"{described[0]!r} is the label: the file names its classes"
    few = [
        name
        for name in free
        if name.lower() not in IDS
        and 2 <= len(values := {str(row.get(name)).strip() for row in rows}) <= max(2, min(50, len(rows) // 5))
        and not _decimal(values)
        and _words(rows, name) < WORDS_OF_TEXT
    ]
    if len(few) == 1:
        return few[0], f"{few[0]!r} is the label: it has few different values"
    return None, ""


def _guess_inputs(
    names: Sequence[str], rows: Sequence[Mapping[str, Any]], source: Source, kind: str | None
) -> tuple[str, tuple[str, ...], str]:
    lower = {name.lower(): name for name in names}
    pictures = [name for name in names if _is_picture(rows[0].get(name))]
    if kind in (None, "image") and pictures:
        by_name = [name for name in pictures if name.lower() in IMAGES] or pictures
        return "image", (by_name[0],), f"{by_name[0]!r} holds images"
    if kind in (None, "text"):
        for first, second in PAIRS:
            if first in lower and second in lower:
                return "text", (lower[first], lower[second]), f"{lower[first]!r} and {lower[second]!r} are two texts"
        called = [lower[word] for word in TEXTS if word in lower and _is_text(rows, lower[word])]
        if called:
            return "text", (called[0],), f"{called[0]!r} is the text, by its name"
        texts = [name for name in names if _is_text(rows, name) and _words(rows, name) >= WORDS_OF_TEXT]
        if len(texts) == 1:
            return "text", (texts[0],), f"{texts[0]!r} is the text: it has the words"
        if len(texts) > 1:
            raise DataError(f"{source.name} has several columns of text, {_list(texts)}. Say which: --text COLUMN.")
    numbers = [name for name in names if name.lower() not in IDS and all(_is_number(row.get(name)) for row in rows)]
    left = [name for name in names if name.lower() not in IDS and name not in numbers]
    if numbers and kind in (None, "numbers") and not left:
        few = _list(numbers) if len(numbers) <= 4 else f"{len(numbers)} columns"
        return "numbers", tuple(numbers), f"{few} are numbers"
    raise DataError(
        f"{source.name} has {_list(names)} besides the label, none of them clearly texts, images or numbers. "
        "Say which: --text COLUMN[,COLUMN]."
    )


def _kind_of(inputs: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    if len(inputs) == 1 and _is_picture(rows[0].get(inputs[0])):
        return "image"
    # a few cells may be slips, which are named later with their lines
    if all(fmean([_is_number(row.get(name)) for row in rows]) >= MOSTLY for name in inputs):
        return "numbers"
    return "text"


def _is_picture(value: Any) -> bool:
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes) or isinstance(value.get("path"), str)
    if isinstance(value, bytes):
        return True
    return isinstance(value, str) and value.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"))


def _is_text(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [row.get(name) for row in rows]
    words = [value for value in values if isinstance(value, str)]
    return bool(words) and not all(_is_number(value) for value in words)


def _words(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    values = [row.get(name) for row in rows]
    return fmean([len(value.split()) if isinstance(value, str) else 1.0 for value in values])


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, bool)


def _decimal(values: set[str]) -> bool:
    """Whether values are decimal numbers, which are measured rather than named."""
    return all(map(_is_number, values)) and any(not float(value).is_integer() for value in values)


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:12]))
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown
