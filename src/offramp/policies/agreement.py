"""What an exit says, and whether two exits say the same: of one class, of one number, or of several labels at once."""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from offramp.errors import ShapeError, ValueRangeError
from offramp.scores import probabilities

__all__ = ["Task", "agrees", "certainty", "check_task", "nothing_said", "said"]

#: classes: one of several (softmax). regression: one number. multilabel: each label yes or no (sigmoid).
Task = Literal["classes", "regression", "multilabel"]


def check_task(task: str, tolerance: float | int) -> None:
    """Nothing, when the task is known and the tolerance is above 0 exactly where there is a number to compare.

    Raises:
        ValueRangeError: otherwise.
    """
    if task not in get_args(Task):
        raise ValueRangeError(f"task is {task!r}; expected one of {', '.join(get_args(Task))}.")
    number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if not number or not 0 <= tolerance < float("inf") or (task == "regression") != (tolerance > 0):
        raise ValueRangeError(
            f"tolerance is {tolerance!r} for task {task!r}; expected a number above 0 for regression, the largest "
            "difference that counts as agreement, and 0 otherwise."
        )


def said(logits: Float[Tensor, "batch cls"], task: Task) -> Tensor:
    """What an exit answers: a class int64 [batch], a number float32 [batch], or flags int64 [batch cls].

    Raises:
        ShapeError: a regression with more than one output.
    """
    if task == "classes":
        return logits.argmax(dim=-1)
    if task == "multilabel":
        return (logits > 0).to(torch.int64)
    if logits.shape[-1] != 1:
        raise ShapeError(f"regression has one output; got {logits.shape[-1]}. Use task='classes' or 'multilabel'.")
    return logits[:, 0].float()


def nothing_said(logits: Float[Tensor, "batch cls"], task: Task) -> Tensor:
    """A value shaped as `said` gives it, which agrees with nothing."""
    if task == "regression":
        return torch.full_like(logits[:, 0], float("nan"), dtype=torch.float32)
    return torch.full_like(logits if task == "multilabel" else logits[:, 0], -1, dtype=torch.int64)


def agrees(now: Tensor, before: Tensor, task: Task, tolerance: float) -> Bool[Tensor, "batch"]:
    """Where two exits say the same: the same class, the same flags, or numbers less than `tolerance` apart."""
    if task == "classes":
        return now == before
    if task == "multilabel":
        return (now == before).all(dim=-1)
    return (now - before).abs() < tolerance


def certainty(logits: Float[Tensor, "batch cls"], task: Task) -> Float[Tensor, "batch"]:
    """How sure an exit is of what it says: the largest probability; of several labels the mean of max(p, 1 - p);
    a regression says nothing about that, so 1."""
    if task == "classes":
        return probabilities(logits).amax(dim=-1)
    if task == "multilabel":
        return torch.sigmoid(logits.float().abs()).mean(dim=-1)
    return torch.ones_like(logits[:, 0], dtype=torch.float32)
