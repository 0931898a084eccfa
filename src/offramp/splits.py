"""Seeded splits of rows that keep the share of every class."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from offramp.errors import ShapeError, ValueRangeError

__all__ = ["stratified_split"]


def stratified_split(labels: Int[Tensor, "row"], shares: Sequence[float | int], seed: int = 0) -> list[Tensor]:
    """Disjoint sorted row indices, int64, one tensor per share, each with about the same mix of classes.

    Every class is shuffled by the seed and cut at the cumulated shares, rounded; so a part is off by at most one row
    per class. When the shares sum to 1, every row is in exactly one part; when they sum to less, the rest is in none.

    Raises:
        ShapeError: `labels` is not one integer per row.
        ValueRangeError: a share is not positive, or they sum to more than 1.
    """
    if labels.ndim != 1 or labels.dtype.is_floating_point:
        raise ShapeError(f"labels have shape {list(labels.shape)} and dtype {labels.dtype}; expected integers [row].")
    if not shares or not all(share > 0 for share in shares) or sum(shares) > 1 + 1e-9:
        raise ValueRangeError(f"shares are {list(shares)}; expected positive numbers that sum to at most 1.")
    generator = torch.Generator().manual_seed(seed)
    edges = torch.tensor([0.0, *shares], dtype=torch.float64).cumsum(0)
    parts: list[list[Tensor]] = [[] for _ in shares]
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten().cpu()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        # One random offset per class: without it, rounding would favour the same part in every class.
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        cuts = (edges * len(rows) + offset).floor().to(torch.int64)
        cuts[0] = 0
        if abs(sum(shares) - 1) < 1e-9:
            cuts[-1] = len(rows)
        bounds = cuts.clamp(max=len(rows)).tolist()
        for part, (low, high) in zip(parts, pairwise(bounds), strict=True):
            part.append(rows[low:high])
    return [torch.cat(part).sort().values if part else torch.empty(0, dtype=torch.int64) for part in parts]
