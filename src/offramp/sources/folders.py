"""A folder of images, a folder of tables, and a data set of the hub."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offramp.errors import DataError, MissingExtra, first_line
from offramp.sources.base import Numbered, Source, split_called
from offramp.sources.tables import SUFFIXES, Folded, table

__all__ = ["Hub", "ImageFolder", "folder"]

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def folder(path: Path, encoding: str = "utf-8") -> Source:
    """The source of a folder: tables called train, validation and test, or images.

    Raises:
        DataError: it holds neither.
    """
    tables: dict[str, Source] = {}
    for file in sorted(path.iterdir()):
        name = file.name.lower().removesuffix(".gz")
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        if file.is_file() and suffix is not None and not name.startswith("."):
            stem = name.removesuffix(suffix)
            # the hub calls its files train-00000-of-00001.parquet
            split = split_called(stem) or split_called(stem.partition("-")[0]) or stem
            if split in tables:
                raise DataError(f"{path} has two files for {split!r}, one of them {file.name}; expected one for each.")
            tables[split] = table(file, encoding)
    if tables:
        order = ["train", "validation", "test"]
        ordered = sorted(tables, key=lambda split: (order.index(split) if split in order else 3, split))
        return Folded(str(path), {split: tables[split] for split in ordered})
    return ImageFolder(path)


class ImageFolder(Source):
    """Images in folders called by their class, perhaps within folders called train, validation and test.

    Rows have `image` (a path), `file` (the path within the folder) and `label` (the class; absent when images lie in
    the folder itself). Links to folders and hidden files are passed over.

    Raises:
        DataError: there is no image.
    """

    unit = "image"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.name = path, str(path)
        inside = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
        splits = {split: child for child in inside if (split := split_called(child.name)) is not None}
        whole = bool(splits) and len(splits) == len(inside)
        self._roots: dict[str, Path] = splits if whole else {}
        self.splits = tuple(split for split in ("train", "validation", "test") if split in self._roots)
        first = next(self.rows(), None)
        if first is None:
            raise DataError(
                f"{path} holds no images ({', '.join(IMAGES[:5])}, ...) and no tables; expected "
                "FOLDER/CLASS/image.png, or train.csv or such."
            )
        self.columns = tuple(first[1])

    def rows(self, split: str | None = None) -> Iterator[Numbered]:
        """(image from 1, row), by class and then by name."""
        name = self.check_split(split)
        root = self.path if name is None else self._roots[name]
        number = 0
        for where, inside, files in os.walk(root):
            inside[:] = sorted(child for child in inside if not child.startswith("."))
            for file in sorted(files):
                if file.startswith(".") or not file.lower().endswith(IMAGES):
                    continue
                number += 1
                path = Path(where) / file
                parts = path.relative_to(root).parts
                row: dict[str, Any] = {"image": str(path), "file": str(path.relative_to(self.path))}
                yield number, row | ({"label": parts[0]} if len(parts) > 1 else {})


class Hub(Source):
    """A data set of the hub, by the `datasets` library; "name:configuration" names a configuration.

    Raises:
        DataError: it cannot be loaded.
        MissingExtra: `datasets` is not installed.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            import datasets
        except ImportError:
            raise MissingExtra(f"the data set {name!r} of the hub needs: pip install 'offramp[train]'.") from None
        self.name = name
        path, _, configuration = name.partition(":")
        try:
            found = datasets.load_dataset(path, configuration or None)
        except Exception as error:  # the hub, the network, and the data set's own scripts raise many kinds
            told = first_line(error)
            raise DataError(
                f"{name!r} is no file or folder here, and the hub does not give it as a data set: {told}."
            ) from None
        self._splits = found if isinstance(found, dict) else {"train": found}
        self.splits = tuple(self._splits)
        features = self._splits[self.splits[0]].features
        self.columns = tuple(features)
        for column, feature in features.items():
            if isinstance(feature, datasets.ClassLabel):
                self.classes[column] = tuple(feature.names)
            elif isinstance(feature, datasets.Image):  # our own decoding, which names what is corrupt
                plain = datasets.Image(decode=False)
                self._splits = {split: rows.cast_column(column, plain) for split, rows in self._splits.items()}

    def rows(self, split: str | None = None) -> Iterator[Numbered]:
        """(row from 1, row) of a split, the first one unless named."""
        yield from enumerate(self._splits[self.check_split(split) or self.splits[0]], 1)
