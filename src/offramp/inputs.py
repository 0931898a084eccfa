"""What a model is fed: one tensor, or several by name, each with the rows first."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from offramp.errors import ShapeError

__all__ = ["Inputs", "batch_size", "mask_of", "names_of", "select_rows", "tensors_of"]

Inputs = Tensor | Mapping[str, Tensor]


def names_of(inputs: Inputs) -> tuple[str, ...]:
    """The names of the inputs in their order; a single tensor is called "input"."""
    return ("input",) if isinstance(inputs, Tensor) else tuple(inputs)


def tensors_of(inputs: Inputs) -> tuple[Tensor, ...]:
    """The tensors of the inputs in their order, each [batch ...]."""
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs.values())


def batch_size(inputs: Inputs) -> int:
    """The number of rows.

    Raises:
        ShapeError: there is no tensor, one has no axes, or two have different numbers of rows.
    """
    if not isinstance(inputs, Tensor | Mapping):
        raise ShapeError(f"Inputs are {type(inputs).__name__}; expected a tensor [batch ...] or tensors by name.")
    sizes = {}
    for name, tensor in zip(names_of(inputs), tensors_of(inputs), strict=True):
        if not isinstance(tensor, Tensor) or tensor.ndim == 0:
            got = "a tensor without axes" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ShapeError(f"Input {name!r} is {got}; expected a tensor [batch ...], rows first.")
        sizes[name] = tensor.shape[0]
    if len(set(sizes.values())) != 1:
        raise ShapeError(f"Inputs have {sizes} rows; expected the same number in each, at least one input.")
    return next(iter(sizes.values()))


def select_rows(inputs: Inputs, index: Int64[Tensor, "rows"] | Bool[Tensor, "batch"]) -> Inputs:
    """The inputs of the rows in `index` (row numbers, or one truth value per row), in that order."""
    if index.dtype == torch.bool:
        index = index.nonzero().flatten()
    if isinstance(inputs, Tensor):
        return inputs.index_select(0, index)
    return {name: tensor.index_select(0, index) for name, tensor in inputs.items()}


def mask_of(inputs: Inputs) -> Tensor | None:
    """The `attention_mask` [batch tok] among the inputs, or None."""
    return None if isinstance(inputs, Tensor) else inputs.get("attention_mask")
