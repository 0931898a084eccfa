"""Whatever a user has, as batches: rows, tensors, a torch Dataset, a DataLoader."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from offramp.data import Augment, Batch, Batches, Examples, batches, row_order, seed_for
from offramp.errors import DataError
from offramp.tokenrows import TokenRows

__all__ = ["as_data", "as_loader", "fingerprint"]

ACCEPTED = (
    "expected offramp.data.Examples, TokenRows, a pair (inputs, labels) of tensors, a torch Dataset with a length, or "
    "a DataLoader, whose rows are pairs (x, y) or mappings with the key 'labels' or 'label'"
)


def as_data(data: Any) -> Any:
    """The data in a form that `as_loader` takes many times: a pair of tensors becomes Examples, all else stays.

    Raises:
        DataError: the data are of no kind that can be used, or are empty.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return Examples(data[0], data[1])
    if isinstance(data, Examples | TokenRows):
        return data
    usable = isinstance(data, DataLoader) or (hasattr(data, "__getitem__") and hasattr(data, "__len__"))
    if not usable or isinstance(data, Mapping | str | Tensor | IterableDataset):
        raise DataError(f"data are {type(data).__name__}; {ACCEPTED}.")
    if not (isinstance(data, DataLoader) and isinstance(data.dataset, IterableDataset)) and len(data) == 0:
        raise DataError("the data set is empty. Give at least one row.")
    return data


def as_loader(
    data: Any,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    bucket: bool = False,
    augment: Augment | None = None,
    start: int = 0,
) -> "Batches | _RowBatches | _Loaded":
    """The batches of one epoch from number `start` on, as `Batch(inputs, labels, rows)`.

    A DataLoader keeps its own batch size and order, and its rows are numbered as they come; with `shuffle`, the seed
    decides what it draws.

    Raises:
        DataError: the data are of no kind that can be used, or are empty.
    """
    data = as_data(data)
    if isinstance(data, Examples | TokenRows):
        return batches(
            data, batch_size, shuffle=shuffle, seed=seed, epoch=epoch, bucket=bucket, augment=augment, start=start
        )
    mixed = seed_for(seed, epoch)
    if isinstance(data, DataLoader):
        return _Loaded(data, mixed if shuffle else None, augment, start)
    return _RowBatches(data, row_order(len(data), batch_size, shuffle, mixed), mixed, augment, start)


def fingerprint(data: Any) -> str:
    """By which a stopped training knows its data again: a checksum of Examples, else kind and number of rows."""
    if isinstance(data, Examples | TokenRows):
        return data.fingerprint()
    inner = data.dataset if isinstance(data, DataLoader) else data
    return f"{type(data).__name__} of {len(data)} over {type(inner).__name__}"


class _RowBatches:
    """Batches of a torch Dataset with a length."""

    def __init__(self, data: Any, order: list[Tensor], seed: int, augment: Augment | None, start: int):
        self.data, self.order, self.seed, self.augment, self.start = data, order, seed, augment, start

    def __len__(self) -> int:
        return len(self.order) - self.start

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.start, len(self.order)):
            rows = self.order[number]
            try:
                stacked = default_collate([self.data[row] for row in rows.tolist()])
            except (RuntimeError, TypeError) as error:
                raise DataError(
                    f"the rows cannot be stacked to a batch ({str(error).splitlines()[0]}). "
                    "Pass a DataLoader with its own collate_fn, or offramp.data.Examples."
                ) from error
            yield _augmented(_pair(stacked), rows, self.augment, seed_for(self.seed, number))


class _Loaded:
    """Batches of a user's DataLoader, numbered as they come."""

    def __init__(self, loader: Any, seed: int | None, augment: Augment | None, start: int):
        self.loader, self.seed, self.augment, self.start = loader, seed, augment, start

    def __len__(self) -> int:
        return len(self.loader) - self.start

    def __iter__(self) -> Iterator[Batch]:
        loader = self.loader
        if self.seed is not None:
            for holder in (loader, loader.sampler):
                if isinstance(getattr(holder, "generator", None), torch.Generator):
                    holder.generator.manual_seed(self.seed)
            torch.manual_seed(self.seed)  # the order of a loader without a generator comes from here
        seen = 0
        if self.start:
            from accelerate import skip_first_batches

            seen = self.start * (loader.batch_size or 0)
            loader = skip_first_batches(loader, self.start)
        for number, got in enumerate(loader, self.start):
            inputs, labels = _pair(got)
            size = _size(inputs)
            rows = torch.arange(seen, seen + size)
            yield _augmented((inputs, labels), rows, self.augment, seed_for(self.seed or 0, number))
            seen += size


def _pair(got: Any) -> tuple[Any, Tensor | None]:
    if isinstance(got, Batch):
        return got.inputs, got.labels
    if isinstance(got, Mapping):
        rest = {k: v for k, v in got.items() if isinstance(v, Tensor)}
        labels = rest.pop("labels", None)
        labels = rest.pop("label", None) if labels is None else labels
        if rest:
            return rest, labels
    elif isinstance(got, tuple | list) and len(got) in (1, 2):
        inputs = dict(got[0]) if isinstance(got[0], Mapping) else got[0]
        if isinstance(inputs, Tensor | dict):
            return inputs, got[1] if len(got) == 2 else None
    elif isinstance(got, Tensor):
        return got, None
    raise DataError(f"a batch is {type(got).__name__}; {ACCEPTED}.")


def _augmented(pair: tuple[Any, Tensor | None], rows: Tensor, augment: Augment | None, seed: int) -> Batch:
    inputs = augment(pair[0], torch.Generator().manual_seed(seed)) if augment else pair[0]
    return Batch(inputs, pair[1], rows)


def _size(inputs: Any) -> int:
    return len(next(iter(inputs.values()))) if isinstance(inputs, Mapping) else len(inputs)
