"""What every source of rows is."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from offramp.errors import DataError

__all__ = ["SPLITS", "Numbered", "Source", "split_called"]

#: Names of files, folders and hub splits, by what they are for.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}

Numbered = tuple[int, Mapping[str, Any]]


class Source:
    """Rows by name of column, in one or several splits, read as they are wanted.

    Attributes:
        name: for messages.
        unit: what `number` counts in messages: a line, a row, an image.
        columns: names of the columns.
        splits: names of the splits, () when there is only one thing to read.
        classes: for columns of class numbers, the names of the classes.
        skipped: how many blank lines were passed over so far.
    """

    name: str
    unit: str = "row"
    columns: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.classes: dict[str, tuple[str, ...]] = {}
        self.skipped = 0

    def rows(self, split: str | None = None) -> Iterator[Numbered]:
        """(number, row) in order; nothing is read before it is asked for.

        Raises:
            DataError: the split does not exist, or a row cannot be read.
        """
        raise NotImplementedError

    def where(self, number: int) -> str:
        """A row for a message."""
        return f"{self.unit} {number} of {self.name}"

    def head(self, count: int, split: str | None = None) -> list[Mapping[str, Any]]:
        """The first rows."""
        return [row for _, row in islice(self.rows(split), count)]

    def check_split(self, split: str | None) -> str | None:
        """The split's own name; None when there is only one thing to read.

        Raises:
            DataError: it does not exist.
        """
        if split is None or not self.splits:
            return self.splits[0] if self.splits else None
        found = next((own for own in self.splits if own == split or split_called(own) == split), None)
        if found is None:
            raise DataError(f"{self.name} has no split {split!r}; it has {', '.join(self.splits)}.")
        return found


def split_called(name: str) -> str | None:
    """train, validation or test, for a name that means it; otherwise None."""
    word = name.lower()
    return next((split for split, words in SPLITS.items() if word in words), None)
