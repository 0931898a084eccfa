"""What a decoder's layers look at besides its own tokens."""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

from offramp.generation.picking import pick, picked

__all__ = ["Memory"]


class Memory:
    """Keys and values of an encoder's states, [row head memory each] for every layer, made when a row's token first
    comes to a layer: a text of which no token gets so far never pays for them. Those of some rows are kept while the
    same rows are asked.

    Args:
        make: (keys, values) of a layer, from states of some rows.
        encoded: the states of all rows.
    """

    def __init__(
        self, make: Callable[[int, Tensor], tuple[Tensor, Tensor]], encoded: Float[Tensor, "row memory dim"]
    ) -> None:
        self._make, self._encoded, self._index = make, encoded, list(range(len(encoded)))
        self._whole: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: dict[int, set[int]] = {}
        self._some: dict[int, tuple[list[int], tuple[Tensor, Tensor]]] = {}

    def __getitem__(self, j: int) -> tuple[Tensor, Tensor]:
        """(keys, values) of layer j."""
        made = self._made.setdefault(j, set())
        if not made.issuperset(self._index):
            self._more(j, [row for row in dict.fromkeys(self._index) if row not in made])
        kept = self._some.get(j)
        if kept is None or kept[0] != self._index:
            keys, values = self._whole[j]
            rows = picked(self._index, len(keys), keys.device)
            kept = self._some[j] = self._index, (pick(keys, rows), pick(values, rows))
        return kept[1]

    def of(self, rows: Sequence[int]) -> "Memory":
        """That of some rows, in this order; what is made for one is there for the other."""
        part = Memory(self._make, self._encoded)
        part._whole, part._made, part._some = self._whole, self._made, self._some
        part._index = [self._index[row] for row in rows]
        return part

    def _more(self, j: int, rows: list[int]) -> None:
        """Nothing; layer j has these rows, too."""
        every = len(self._encoded)
        which = picked(rows, every, self._encoded.device)
        found = self._make(j, pick(self._encoded, which))
        if len(rows) == every:
            self._whole[j] = found
        else:
            if j not in self._whole:
                keys, values = (part.new_empty((every, *part.shape[1:])) for part in found)
                self._whole[j] = keys, values
            for whole, part in zip(self._whole[j], found, strict=True):
                whole[which] = part
        self._made[j].update(rows)
