"""What a decoder's layers look at besides its own tokens."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Memory"]


class Memory:
    """Keys and values of an encoder's states, [batch head memory each] for every layer, made when a layer first runs:
    a text of which no token gets so far never pays for them. Some rows of them are kept while the same rows are asked.

    Args:
        make: (keys, values) of a layer, of all rows.
        rows: of the batch.
    """

    def __init__(self, make: Callable[[int], tuple[Tensor, Tensor]], rows: int) -> None:
        self._make, self._all, self._index = make, list(range(rows)), list(range(rows))
        self._whole: dict[int, tuple[Tensor, Tensor]] = {}
        self._some: dict[int, tuple[list[int], tuple[Tensor, Tensor]]] = {}

    def __getitem__(self, j: int) -> tuple[Tensor, Tensor]:
        """(keys, values) of layer j."""
        if j not in self._whole:
            self._whole[j] = self._make(j)
        if self._index == self._all:
            return self._whole[j]
        kept = self._some.get(j)
        if kept is None or kept[0] != self._index:
            keys, values = self._whole[j]
            spots = torch.tensor(self._index, device=keys.device)
            kept = self._some[j] = self._index, (keys[spots], values[spots])
        return kept[1]

    def of(self, rows: Sequence[int]) -> "Memory":
        """That of some rows, in this order; what is made for one is there for the other."""
        part = Memory(self._make, 0)
        part._all, part._whole, part._some = self._all, self._whole, self._some
        part._index = [self._index[row] for row in rows]
        return part
