"""Axis words that every signature uses, and checks of shape with one kind of message.

exit   exits, 0-based, the last is E-1      row    rows of a recorded trace
batch  rows in flight                       cls    classes
ch     channels    tok  tokens    dim  hidden width    sig  signals
"""

import torch
from torch import Tensor

from offramp.errors import ShapeError, ValueRangeError

__all__ = ["check_finite", "check_labels", "check_shape"]


def check_shape(tensor: Tensor, axes: str, what: str) -> Tensor:
    """The tensor itself, when it has one axis per word of `axes`, e.g. "exit row cls"."""
    words = axes.split()
    if tensor.ndim != len(words):
        raise ShapeError(f"{what} has shape {list(tensor.shape)}; expected {len(words)} axes [{axes}].")
    return tensor


def check_finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor itself, when no element is NaN or infinite."""
    bad = ~torch.isfinite(tensor)
    if bad.any():
        first = bad.nonzero()[0].tolist()
        raise ValueRangeError(
            f"{what} has {int(bad.sum())} values that are NaN or infinite, the first at {first}. "
            "Remove those rows, or look for a diverged training or an overflow in half precision."
        )
    return tensor


def check_labels(labels: Tensor, rows: int, classes: int, what: str = "labels") -> Tensor:
    """The labels as int64 [row], when there is one per row, each in 0..classes-1."""
    if labels.ndim != 1 or labels.shape[0] != rows:
        raise ShapeError(f"{what} has shape {list(labels.shape)}; expected [{rows}], one label per row.")
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ShapeError(f"{what} has dtype {labels.dtype}; expected class indices as an integer dtype.")
    labels = labels.to(torch.int64)
    if rows and (labels.min() < 0 or labels.max() >= classes):
        low, high = int(labels.min()), int(labels.max())
        raise ValueRangeError(f"{what} range from {low} to {high}; expected 0 to {classes - 1} for {classes} classes.")
    return labels
