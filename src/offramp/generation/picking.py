"""Some rows of a batch, without a copy where they are one or all."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Picked", "pick", "picked"]

Picked = slice | Tensor


def picked(rows: Sequence[int], of: int, device: torch.device) -> Picked:
    """These rows of `of`, as `pick` takes them."""
    if len(rows) == 1:
        return slice(rows[0], rows[0] + 1)
    return slice(None) if list(rows) == list(range(of)) else torch.tensor(rows, device=device)


def pick(tensor: Tensor, rows: Picked) -> Tensor:
    """Rows of the first dimension: a view, or a copy where they have to be gathered."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)
