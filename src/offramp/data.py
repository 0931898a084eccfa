"""Data sets as rows that batches are made of: images, or token sequences of different lengths."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int, Shaped
from torch import Generator, Tensor

from offramp.errors import DataError, ShapeError, ValueRangeError
from offramp.shapes import check_finite

__all__ = ["Augment", "Batch", "Batches", "Examples", "Ragged", "RowSource", "batches", "row_order", "seed_for"]

Augment = Callable[[Any, Generator], Any]
Rows = Int[Tensor, "batch"]
MEGA = 50  # batches that are sorted by length together: enough to save padding, few enough to keep the order random


class Batch(NamedTuple):
    """What the model gets at once: inputs [batch ...] or a mapping of them, labels [batch] and row numbers [batch]."""

    inputs: Any
    labels: Tensor | None
    rows: Tensor


class Ragged:
    """Rows of integers of different lengths, kept as one flat tensor."""

    def __init__(self, values: Shaped[Tensor, "total"], starts: Int[Tensor, "edges"]):
        self.values, self.starts = values, starts

    @classmethod
    def of(cls, rows: Sequence[Any]) -> "Ragged":
        """The rows, each a 1-D integer tensor or a sequence of integers."""
        flat = [torch.as_tensor(row) for row in rows]
        if any(row.ndim != 1 or row.dtype.is_floating_point for row in flat):
            raise ShapeError("a row of token inputs is not a list of integers; expected 1-D integer tensors [tok].")
        lengths = torch.tensor([0, *[len(row) for row in flat]], dtype=torch.int64)
        values = torch.cat([row.to(torch.int64) for row in flat]) if flat else torch.empty(0, dtype=torch.int64)
        return cls(values, lengths.cumsum(0))

    @property
    def lengths(self) -> Int[Tensor, "row"]:
        """The number of tokens of every row."""
        return self.starts.diff()

    def __len__(self) -> int:
        return len(self.starts) - 1

    def pad(self, rows: Rows, fill: int) -> Int[Tensor, "batch tok"]:
        """The given rows, filled up on the right to the longest of them."""
        starts, lengths = self.starts[rows], self.lengths[rows]
        steps = torch.arange(int(lengths.max()) if len(rows) else 0)
        real = steps < lengths.unsqueeze(1)
        where = torch.where(real, starts.unsqueeze(1) + steps, 0)
        return torch.where(real, self.values[where], fill) if len(self.values) else real.to(torch.int64)

    def select(self, rows: Rows) -> "Ragged":
        """The given rows alone."""
        lengths = self.lengths[rows]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        row_of = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        inside = torch.arange(len(row_of)) - starts[row_of]
        return Ragged(self.values[self.starts[rows][row_of] + inside], starts)


class Examples:
    """Rows with labels, from which batches are made.

    Args:
        inputs: a tensor [row ...]; or, for models that take keywords, a mapping from the keyword to a tensor [row ...]
            or to a sequence of 1-D integer tensors [tok] of different lengths, padded to the longest of a batch.
        labels: class indices [row], any integer dtype; None for rows to predict only.
        ids: one whole number per row that says which it is; None for 0, 1, 2, ...
        label_names: the name of every class.
        pad_id: what `input_ids` is padded with; every other key is padded with 0.
        prepare: applied to the inputs of every batch, e.g. `Normalise` on images kept as bytes.
        truncated: how many rows were cut to fit the longest length allowed, for reports.

    Raises:
        DataError: there are no rows, or the keys of the mapping have different numbers of rows.
        ShapeError: the labels are not whole numbers, one per row.
        ValueRangeError: a label is negative, or an input is NaN or infinite.
    """

    def __init__(
        self,
        inputs: Tensor | Mapping[str, Any],
        labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        label_names: Sequence[str] | None = None,
        pad_id: int = 0,
        prepare: Callable[[Any], Any] | None = None,
        truncated: int = 0,
    ):
        self.inputs: Any = _inputs(inputs)
        self.rows = _rows(self.inputs)
        self.labels = None if labels is None else _labels(labels, self.rows)
        self.ids = torch.arange(self.rows) if ids is None else ids
        if self.ids.shape != (self.rows,):
            raise ShapeError(f"ids have shape {list(self.ids.shape)}; expected [{self.rows}], one per row.")
        self.label_names = None if label_names is None else tuple(label_names)
        self.pad_id, self.prepare, self.truncated = pad_id, prepare, truncated

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> tuple[Any, Tensor | None]:
        """Inputs and label of one row, without the batch axis."""
        if not -self.rows <= row < self.rows:
            raise IndexError(f"row {row} of {self.rows}")
        batch = self.batch(torch.tensor([row % self.rows]))
        one = {k: v[0] for k, v in batch.inputs.items()} if isinstance(batch.inputs, Mapping) else batch.inputs[0]
        return one, None if batch.labels is None else batch.labels[0]

    def __repr__(self) -> str:
        kind = list(self.inputs) if isinstance(self.inputs, Mapping) else list(self.inputs.shape[1:])
        return f"Examples({self.rows} rows of {kind}, {'no labels' if self.labels is None else 'labelled'})"

    @property
    def lengths(self) -> Int[Tensor, "row"] | None:
        """The number of tokens of every row; None when rows have one size, as images have."""
        if not isinstance(self.inputs, Mapping):
            return None
        for value in self.inputs.values():
            if isinstance(value, Ragged):
                return value.lengths
        return _masked_lengths(self.inputs)

    def select(self, rows: Tensor | Sequence[int]) -> "Examples":
        """The given rows, in the given order; their ids come along."""
        chosen = torch.as_tensor(rows, dtype=torch.int64)
        picked: Any = _pick(self.inputs, chosen)
        other = object.__new__(Examples)
        other.__dict__.update(self.__dict__)
        other.inputs, other.rows, other.ids = picked, len(chosen), self.ids[chosen]
        other.labels = None if self.labels is None else self.labels[chosen]
        if not len(chosen):
            raise DataError("no row is selected. Give at least one.")
        return other

    def batch(self, rows: Rows, augment: Augment | None = None, generator: Generator | None = None) -> Batch:
        """The given rows as one batch: padded, augmented if asked, then prepared."""
        inputs = self.inputs
        if isinstance(inputs, Mapping):
            fill = {"input_ids": self.pad_id}
            longest = _masked_lengths(inputs)
            width = None if longest is None else int(longest[rows].max())
            inputs = {
                k: v.pad(rows, fill.get(k, 0)) if isinstance(v, Ragged) else _trim(v[rows], width, v.shape)
                for k, v in inputs.items()
            }
        else:
            inputs = inputs[rows]
        if augment is not None:
            inputs = augment(inputs, generator or torch.default_generator)
        if self.prepare is not None:
            inputs = self.prepare(inputs)
        return Batch(inputs, None if self.labels is None else self.labels[rows], rows)

    def fingerprint(self) -> str:
        """A checksum of inputs and labels, by which a stopped training knows its data again."""
        parts = self.inputs.values() if isinstance(self.inputs, Mapping) else [self.inputs]
        tensors = [t for p in parts for t in ((p.values, p.starts) if isinstance(p, Ragged) else (p,))]
        crc = 0
        for tensor in [*tensors, *([] if self.labels is None else [self.labels])]:
            raw: Any = tensor.contiguous().numpy()
            crc = zlib.crc32(raw, crc)
        return f"{self.rows} rows, crc32 {crc:08x}"


@runtime_checkable
class RowSource(Protocol):
    """Rows in memory: how many, how long, and any of them as a batch."""

    @property
    def lengths(self) -> Tensor | None:
        """Tokens of each row, None where rows are alike."""
        ...

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor, augment: Augment | None = None, generator: Generator | None = None) -> Batch:
        """Some rows, augmented if asked."""
        ...


class Batches:
    """Batches in a fixed order, from number `start` on. Iterating twice gives the same batches twice."""

    def __init__(self, examples: RowSource, order: list[Tensor], seed: int, augment: Augment | None, start: int):
        self.examples, self.order, self.start = examples, order, start
        self._seed, self._augment = seed, augment

    def __len__(self) -> int:
        return len(self.order) - self.start

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.start, len(self.order)):
            # A generator of its own per batch: starting in the middle draws what a run from the beginning would.
            generator = torch.Generator().manual_seed(seed_for(self._seed, number)) if self._augment else None
            yield self.examples.batch(self.order[number], self._augment, generator)


def batches(
    examples: RowSource,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    bucket: bool = False,
    augment: Augment | None = None,
    start: int = 0,
) -> Batches:
    """The batches of one epoch; `batch.rows` says which rows each holds.

    The order depends on `seed`, `epoch` and nothing else. With `bucket`, rows of about the same length share a batch,
    which saves padding; without `shuffle`, that means the longest come first.

    Raises:
        ValueRangeError: `batch_size` is not a whole number above 0.
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueRangeError(f"batch_size is {batch_size!r}; expected a whole number, 1 or more.")
    mixed = seed_for(seed, epoch)
    order = row_order(len(examples), batch_size, shuffle, mixed, examples.lengths if bucket else None)
    return Batches(examples, order, mixed, augment, start)


def row_order(
    rows: int, batch_size: int, shuffle: bool, seed: int, lengths: Int[Tensor, "row"] | None = None
) -> list[Tensor]:
    """Row numbers, one tensor per batch; grouped by length when lengths are given."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator) if shuffle else torch.arange(rows)
    if lengths is None:
        return list(order.split(batch_size))
    groups = order.split(MEGA * batch_size) if shuffle else (order,)
    parts: list[Tensor] = []
    for group in groups:
        parts += group[lengths[group].argsort(descending=True, stable=True)].split(batch_size)
    if not shuffle:
        return parts
    return [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]


def seed_for(seed: int, *numbers: int) -> int:
    """A seed below 2^63 that depends on all the numbers, so that no two steps share their draws."""
    for number in numbers:
        seed = _scramble(_scramble(seed) ^ number)
    return seed % 2**63


def _scramble(number: int) -> int:
    """The finaliser of splitmix64: a one-to-one map of 64-bit numbers without visible order."""
    number = (number + 0x9E3779B97F4A7C15) % 2**64
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) % 2**64
    return number ^ (number >> 31)


def _inputs(inputs: Tensor | Mapping[str, Any]) -> Any:
    if isinstance(inputs, Tensor):
        return check_finite(inputs, "inputs") if inputs.dtype.is_floating_point else inputs
    if not isinstance(inputs, Mapping) or not inputs:
        raise DataError(f"inputs are {type(inputs).__name__}; expected a tensor or a mapping from keyword to tensor.")
    made: dict[str, Any] = {}
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.dtype.is_floating_point:
            check_finite(value, f"inputs[{key!r}]")
        made[key] = value if isinstance(value, Tensor | Ragged) else Ragged.of(value)
    return made


def _rows(inputs: Any) -> int:
    sizes = {k: len(v) for k, v in inputs.items()} if isinstance(inputs, Mapping) else {"inputs": len(inputs)}
    if len(set(sizes.values())) > 1:
        raise DataError(f"the inputs have different numbers of rows: {sizes}. Give every key one entry per row.")
    rows = next(iter(sizes.values()))
    if rows == 0:
        raise DataError("the data set is empty. Give at least one row.")
    return rows


def _labels(labels: Tensor, rows: int) -> Tensor:
    if labels.ndim != 1 or len(labels) != rows:
        raise ShapeError(f"labels have shape {list(labels.shape)}; expected [{rows}], one label per row.")
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ShapeError(f"labels have dtype {labels.dtype}; expected class indices as integers, e.g. labels.long().")
    if labels.min() < 0:
        row = int((labels < 0).nonzero()[0])
        raise ValueRangeError(
            f"label {int(labels[row])} of row {row} is negative; expected class indices from 0. "
            "Remove rows without a label."
        )
    return labels.to(torch.int64)


def _pick(inputs: Any, rows: Tensor) -> Any:
    if isinstance(inputs, Mapping):
        return {k: v.select(rows) if isinstance(v, Ragged) else v[rows] for k, v in inputs.items()}
    return inputs[rows]


def _masked_lengths(inputs: Mapping[str, Any]) -> Tensor | None:
    """Lengths by the attention mask of inputs that came padded on the right."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    lengths = mask.ne(0).sum(1)
    padded_right = bool((mask.ne(0) == (torch.arange(mask.shape[1]) < lengths.unsqueeze(1))).all())
    return lengths.clamp(min=1) if padded_right else None


def _trim(value: Tensor, width: int | None, full: torch.Size) -> Tensor:
    return value if width is None or len(full) != 2 else value[:, :width]
