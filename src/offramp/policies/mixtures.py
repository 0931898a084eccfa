"""What policies share that answer with a mixture of the exits seen so far."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from offramp.errors import ShapeError
from offramp.policies.arrays import Array
from offramp.policies.base import Evidence

__all__ = ["check_mixture", "nothing_mixed"]


def check_mixture(weights: Any, biases: Any, more: Any, name: str, shape: str) -> None:
    """Nothing, when the arrays of a mixture fit each other: [E E], [E cls], and `shape` where there is more.

    Raises:
        ShapeError: they do not.
    """
    arrays = (weights, biases) if more is None else (weights, biases, more)
    if not all(isinstance(array, Array) for array in arrays):
        raise ShapeError(f"weights, biases and {name} are {[type(a).__name__ for a in arrays]}; expected Arrays.")
    shapes = [tuple(array.shape) for array in arrays]
    exits, classes = shapes[1] if len(shapes[1]) == 2 else (-1, -1)
    words = {"E": exits, "cls": classes}
    last = tuple(words[word] if word in words else int(word) for word in shape.strip("[]").split())
    if shapes != [(exits, exits), (exits, classes), last][: len(shapes)]:
        raise ShapeError(f"weights, biases and {name} have shapes {shapes}; expected [E E], [E cls], {shape}.")


def nothing_mixed(policy: Any, seen: Evidence) -> Float[Tensor, "batch 0 cls"]:
    """Log-probabilities of no exit yet, float32, for a policy that was fitted for these classes, or without biases and
    so for any.

    Raises:
        ShapeError: it was fitted for another number of classes.
    """
    found, fitted = seen.logits.shape[-1], policy.biases.shape[1]
    if fitted not in (1, found):
        raise ShapeError(f"{type(policy).__name__} was fitted for {fitted} classes, got {found}: calibrate again.")
    return seen.logits[:, None, :][:, :0].float()
