"""How the gradients of several exits meet in the part of the backbone that they share."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["apart"]


def apart(kind: str, k: int, exits: int, seen: Tensor, tap: Tensor) -> tuple[Tensor, Tensor | None]:
    """(what head k sees, what goes on in the backbone or None for the tap itself), equal to the tap in value.

    Args:
        kind: "equilibrium", "local" or "detached", see `Recipe.gradients`.
        k: of the exit, from 0.
        exits: how many there are, the last included.
        seen: what the head would see.
        tap: what would go on.

    With "equilibrium", head k's gradient counts 1 / (exits - k) where it enters the backbone, and what comes back from
    behind (exits - k - 1) / (exits - k): by induction, every exit behind a place has the same share there, and the
    shares sum to one.

    Source: Li et al. 2019 (Improved Techniques for Training Adaptive Deep Networks), section 3.1.
    """
    if kind == "detached":
        return seen.detach(), None
    if kind == "local":
        return seen, tap.detach()
    behind = exits - k
    return _Scaled.apply(seen, 1 / behind), _Scaled.apply(tap, (behind - 1) / behind)


class _Scaled(torch.autograd.Function):
    """The tensor as it is; its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.clone()  # no view: the backbone may write into it (ReLU(inplace=True))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.factor * grads[0], None
