"""A hashable, frozen float32 array, so that a policy with many parameters is still a value."""

from typing import Any

import torch
from torch import Tensor

from offramp.errors import ShapeError, ValueRangeError

__all__ = ["Array"]

MAX_AXES = 8


class Array:
    """A frozen float32 array that compares, hashes and prints as a value.

    Args:
        values: nested sequences of numbers, or a tensor (copied).

    Raises:
        ShapeError: the values are ragged or not numbers.
        ValueRangeError: a value is NaN or infinite.
    """

    __slots__ = ("_tensors", "_values")

    def __init__(self, values: Any) -> None:
        try:
            source = values.detach() if isinstance(values, Tensor) else values
            tensor = torch.as_tensor(source, dtype=torch.float32).cpu().clone()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ShapeError(f"an array of numbers was expected; got {type(values).__name__}: {error}") from None
        if tensor.ndim > MAX_AXES:
            raise ShapeError(f"an array has {tensor.ndim} axes; expected at most {MAX_AXES}.")
        if not torch.isfinite(tensor).all():
            raise ValueRangeError("an array has values that are NaN or infinite; expected finite numbers.")
        self._values = _frozen(tensor.tolist())
        self._tensors: dict[torch.device, Tensor] = {tensor.device: tensor}

    @property
    def shape(self) -> torch.Size:
        """The array's shape."""
        return self.tensor(torch.device("cpu")).shape

    def tensor(self, device: torch.device) -> Tensor:
        """The values as a float32 tensor on a device; one copy per device is kept. Do not write to it."""
        found = self._tensors.get(device)
        if found is None:
            found = self._tensors[torch.device("cpu")].to(device)
            if not torch.compiler.is_compiling():  # a traced tensor must not outlive its trace
                self._tensors[device] = found
        return found

    def tolist(self) -> Any:
        """The values as nested lists of Python floats."""
        return self._tensors[torch.device("cpu")].tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Array) and self._values == other._values

    def __hash__(self) -> int:
        return hash(self._values)

    def __repr__(self) -> str:
        return f"Array({self.tolist()!r})"


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
