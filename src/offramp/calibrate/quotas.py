"""Thresholds from exit shares: exit by exit, the most confident of the rows that are left."""

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.errors import ValueRangeError

__all__ = ["quota_thresholds"]


def quota_thresholds(
    scores: Float[Tensor, "early row"], shares: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[bool, ...]]:
    """(thresholds, enabled) of the early exits: exit k takes the floor(shares[k] * rows) rows with the highest scores
    among those not yet taken, and its threshold is the lowest score taken. A quota of no rows switches the exit off.

    Tied rows cannot be told apart: all rows at the threshold leave, so a tie may take more than the quota.

    Source: Huang et al. 2018 (MSDNet) section 4; Ilhan et al. 2024 (EENet), released code.
    """
    early, rows = scores.shape
    if len(shares) < early or min(shares) < 0:
        raise ValueRangeError(f"shares {shares} must be at least 0, one for each of {early} early exits.")
    left = torch.ones(rows, dtype=torch.bool)
    thresholds, enabled = [], []
    for k in range(early):
        quota = min(int(shares[k] * rows + 1e-9), int(left.sum()))
        enabled.append(quota > 0)
        if quota == 0:
            thresholds.append(0.0)
            continue
        here = scores[k][left]
        threshold = here.topk(quota).values[-1]
        thresholds.append(float(threshold))
        left &= ~(scores[k] >= threshold)
    return tuple(thresholds), tuple(enabled)
