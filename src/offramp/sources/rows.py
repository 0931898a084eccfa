"""Rows as what training and recording take."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from offramp.data import Examples
from offramp.errors import ValueRangeError
from offramp.preprocess import ImagePreprocess, NumberPreprocess, Preprocess, TextPreprocess

__all__ = ["ImageRows", "as_data", "bytes_of"]

IN_MEMORY = 2**30  # bytes of decoded pixels; more are decoded for each batch


class ImageRows(Dataset[Any]):
    """Images that are decoded when they are asked for: (inputs, label) of one row.

    Args:
        preprocess: what decodes them.
        rows: raw rows.
        labels: int64 [row].
    """

    def __init__(self, preprocess: ImagePreprocess, rows: Sequence[Mapping[str, Any]], labels: Tensor) -> None:
        self.preprocess, self._rows, self.labels = preprocess, rows, labels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> tuple[Any, Tensor]:
        return self.preprocess.normalise(self.preprocess.pixels(self._rows[row])), self.labels[row]


def bytes_of(preprocess: Preprocess, rows: int) -> int:
    """About how many bytes the inputs of so many rows take in memory when training; texts by their longest."""
    if isinstance(preprocess, ImagePreprocess):
        height, width = preprocess.size
        return min(rows * len(preprocess.mean) * height * width, IN_MEMORY)
    if isinstance(preprocess, TextPreprocess):
        return rows * len(preprocess.names) * preprocess.max_length * 8
    return rows * len(preprocess.columns) * 4


def as_data(preprocess: Preprocess, rows: Sequence[Mapping[str, Any]], labels: Tensor | None) -> Any:
    """The rows as `Examples`; images that would take more than 1 GiB as `ImageRows`, decoded for each batch.

    Raises:
        DataError: a row cannot be used.
        ValueRangeError: so many images, and no labels.
    """
    if isinstance(preprocess, TextPreprocess):
        return preprocess.examples(rows, labels)
    if isinstance(preprocess, NumberPreprocess):
        return Examples(preprocess.batch(rows), labels)
    if not isinstance(preprocess, ImagePreprocess):
        return Examples(preprocess.batch(rows), labels)
    height, width = preprocess.size
    if len(rows) * len(preprocess.mean) * height * width <= IN_MEMORY:
        pixels = torch.stack([preprocess.pixels(row) for row in rows])
        return Examples(pixels, labels, prepare=preprocess.normalise)
    if labels is None:
        raise ValueRangeError("images without labels are answered batch by batch: preprocess.batch(rows).")
    return ImageRows(preprocess, rows, labels)
