"""Thresholds from exit shares: exit by exit, the most confident of the rows that are left."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.calibrate.spend import Spend
from offramp.calibrate.thresholds import leave
from offramp.errors import ValueRangeError

__all__ = ["Quotas", "quota_thresholds"]

#: A cost this near below the budget ends the search, and so do so many tries.
CLOSE, TRIES = 0.9995, 24


def quota_thresholds(
    scores: Float[Tensor, "early row"], shares: Sequence[float]
) -> tuple[tuple[float, ...], tuple[bool, ...]]:
    """(thresholds, enabled) of the early exits: exit k takes the floor(shares[k] * rows) rows with the highest scores
    among those not yet taken, and its threshold is the lowest score taken. A quota of no rows switches the exit off.

    Tied rows cannot be told apart: all rows at the threshold leave, so a tie may take more than the quota.

    Source: Huang et al. 2018 (MSDNet) section 4; Ilhan et al. 2024 (EENet), released code.
    """
    early, rows = scores.shape
    if len(shares) < early or min(shares) < 0:
        raise ValueRangeError(f"shares {shares} must be at least 0, one for each of {early} early exits.")
    left = torch.arange(rows)
    thresholds, enabled = [], []
    for k in range(early):
        quota = min(int(shares[k] * rows + 1e-9), len(left))
        enabled.append(quota > 0)
        if quota == 0:
            thresholds.append(0.0)
            continue
        here = scores[k][left]
        threshold = here.kthvalue(len(here) - quota + 1).values
        thresholds.append(float(threshold))
        left = left[here < threshold]
    return tuple(thresholds), tuple(enabled)


class Quotas:
    """Quota thresholds whose simulated cost is the largest found within a budget, over shares that one number moves."""

    def __init__(self, scores: Float[Tensor, "early row"]) -> None:
        self.scores = scores

    def within(
        self,
        spend: Spend,
        shares_of: Callable[[float], Float[Tensor, "visit"]],
        *,
        low: float = -1.0,
        high: float = 1.0,
    ) -> tuple[tuple[float, ...], tuple[bool, ...]] | None:
        """(thresholds, enabled) of the early exits, or None when nothing that was tried is within the budget.

        Args:
            shares_of: a number to shares of the visited exits; the cost of the shares rises with the number.
            low, high: where the number is looked for.
        """
        # by the shares' own cost first, which takes no pass over the rows
        first, last = low, high
        for _ in range(60):
            middle = (first + last) / 2
            within = spend.mean(tuple(shares_of(middle).tolist())) <= spend.amount
            first, last = (middle, last) if within else (first, middle)
        # quotas are floors and ties take more, so the simulated cost differs by a little
        best, under, over, reach = None, None, None, (high - low) / 1000
        knob = first
        for _ in range(TRIES):
            spent, thresholds, on = self.tried(spend, shares_of(knob))
            if spent <= spend.limit:
                under = knob
                if best is None or spent > best[0]:
                    best = (spent, thresholds, on)
                if spent >= CLOSE * spend.amount or knob >= high:
                    break
            else:
                over = knob
                if knob <= low:
                    break
            if under is not None and over is not None:
                knob = (under + over) / 2
            else:  # one side only so far: wider and wider steps to the other
                knob = min(high, knob + reach) if over is None else max(low, knob - reach)
                reach *= 4
        return None if best is None else best[1:]

    def tried(self, spend: Spend, shares: Float[Tensor, "visit"]) -> tuple[float, tuple[float, ...], tuple[bool, ...]]:
        """(the simulated mean cost, thresholds, enabled) of shares; every head runs, as `spend` says."""
        thresholds, on = quota_thresholds(self.scores, tuple(shares.tolist()))
        never = float(self.scores.max()) + 1.0 if self.scores.numel() else 0.0
        used = tuple(t if flag else never for t, flag in zip(thresholds, on, strict=True))
        return spend.mean(leave(self.scores, used)), thresholds, on
