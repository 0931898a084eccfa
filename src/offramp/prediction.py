"""What a run answers."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from offramp.errors import ValueRangeError

__all__ = ["Prediction", "check_finite", "no_rows"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """Answers in the order of the input rows.

    Args:
        label: the most probable class, int64 [batch].
        probabilities: float32 [batch cls], of the exit each row left at.
        exit: the exit each row left at, 0-based int64 [batch].
        score: the policy's score there, float32 [batch].
    """

    label: Int64[Tensor, "batch"]
    probabilities: Float[Tensor, "batch cls"]
    exit: Int64[Tensor, "batch"]
    score: Float[Tensor, "batch"]


def no_rows(classes: int, device: torch.device | None = None) -> Prediction:
    """The answers of a batch without rows."""
    empty = torch.zeros(0, classes, device=device)
    return Prediction(empty.argmax(-1), empty, empty.new_zeros(0, dtype=torch.int64), empty.new_zeros(0))


def check_finite(answer: Float[Tensor, "batch cls"]) -> None:
    """Nothing, when all answers are finite; they are logits or probabilities.

    Raises:
        ValueRangeError: some are NaN or infinite; the message names the rows.
    """
    if math.isfinite(float(answer.sum())):  # one operator where all is well
        return
    rows = (~torch.isfinite(answer).all(dim=1)).nonzero()[:, 0].tolist()
    if rows:
        raise ValueRangeError(
            f"the model's answers for rows {rows[:8]}{' ...' if len(rows) > 8 else ''} are NaN or infinite. "
            "Look for NaN in the inputs, or weights that overflow in this precision."
        )
