"""Columns of numbers as one tensor of features."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from offramp.errors import DataError, ShapeError, ValueRangeError
from offramp.preprocess.base import Row, check_names, write_fields

__all__ = ["NumberPreprocess"]


@dataclass(frozen=True)
class NumberPreprocess:
    """Columns as float32 [batch features], each less its mean and over its standard deviation.

    Args:
        columns: their names, in the order of the features.
        mean, std: one per column, of the training rows.

    Raises:
        ValueRangeError, ShapeError: a value is out of its range, or they are of different lengths.
    """

    kind: ClassVar[str] = "numbers"

    columns: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "columns", check_names(self.columns, "columns", 100_000))
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != len(self.columns):
                raise ShapeError(f"{name} has {len(values)} values for {len(self.columns)} columns.")
            if not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
                raise ValueRangeError(f"{name} must be finite{', above 0' if name == 'std' else ''}.")
            put(self, name, values)

    @classmethod
    def fitted(cls, rows: Iterable[Row], columns: Sequence[str]) -> "NumberPreprocess":
        """The preprocessing whose means and deviations are those of the rows; a constant column gets a deviation of 1.

        Raises:
            DataError: a row cannot be used, or there is none.
        """
        names = check_names(columns, "columns", 100_000)
        raw = cls(names, (0.0,) * len(names), (1.0,) * len(names))
        values = raw.batch(list(rows)).double()
        if not len(values):
            raise DataError("there are no rows to learn means from. Give at least one.")
        std = values.std(dim=0, correction=0)
        std = torch.where(std > 1e-12 * values.abs().amax(dim=0).clamp(min=1e-300), std, torch.ones_like(std))
        return cls(names, tuple(values.mean(dim=0).tolist()), tuple(std.tolist()))

    def check(self, row: Row) -> str | None:
        """Why a row cannot be used, or None when it can."""
        for name in self.columns:
            if name not in row:
                return f"it has no {name!r}"
            if _number(row[name]) is None:
                return f"its {name!r} is {str(row[name])[:40]!r}; expected a finite number"
        return None

    def batch(self, rows: Sequence[Row]) -> Tensor:
        """The features float32 [batch features].

        Raises:
            DataError: a row cannot be used.
        """
        values = []
        for place, row in enumerate(rows):
            numbers = [_number(row.get(name)) for name in self.columns]
            if None in numbers:
                raise DataError(f"row {place} cannot be used: {self.check(row)}.")
            values.append(numbers)
        raw = torch.tensor(values, dtype=torch.float64).reshape(len(rows), len(self.columns))
        return ((raw - torch.tensor(self.mean).double()) / torch.tensor(self.std).double()).float()

    def save(self, folder: Path) -> None:
        """Nothing; preprocess.json is in the folder."""
        fields = {"columns": list(self.columns), "mean": list(self.mean), "std": list(self.std)}
        write_fields(folder, self.kind, fields)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return float(value) if isinstance(value, bool) else None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
