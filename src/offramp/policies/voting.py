"""Voting: leave when enough of the exits so far say the same."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from offramp.errors import ValueRangeError
from offramp.policies.base import NEVER, Evidence, State, Step, as_flags, as_floats, fires

__all__ = ["Voting"]


@dataclass(frozen=True)
class Voting:
    """Leave at the first exit, from the second visited on, with score >= thresholds[k].

        score_k = max_c |{j <= k : y_j = c}| / n_k^power        n_k: exits visited so far

    One vote is no vote, so the first visited exit never fires: with power 1 it would always score 1. The answer is the
    leaving exit's own.

    Args:
        thresholds: one per exit, or one value for all. The last is not used.
        power: below 1, agreement among more exits counts for more. At 1 the score is the share of equal votes.
        enabled: one flag per exit; None means that all are on. Exits that are off have no vote.

    Source: the baseline "voting" of Ilhan et al. 2024 (EENet), released code; Sun et al. 2021. Theirs starts at exit 2
    by setting exit 1's threshold above 1; ours by rule.
    """

    thresholds: tuple[float, ...] | float
    power: float = 1.0
    enabled: tuple[bool, ...] | None = None
    needs: ClassVar[tuple[str, ...]] = ()
    per_exit: ClassVar[tuple[str, ...]] = ("thresholds", "enabled")

    def __post_init__(self) -> None:
        power = as_floats(self.power, "power")
        if isinstance(power, tuple) or not 0 <= power <= 1:
            raise ValueRangeError(f"power is {self.power!r}; expected a number from 0 to 1.")
        object.__setattr__(self, "power", power)
        object.__setattr__(self, "thresholds", as_floats(self.thresholds, "thresholds"))
        object.__setattr__(self, "enabled", as_flags(self.enabled))

    def init(self, seen: Evidence) -> State:
        """(votes float32 [batch cls],)."""
        return (torch.zeros_like(seen.logits, dtype=torch.float32),)

    def step(self, k: int, seen: Evidence, state: State) -> Step:
        """Stop where the largest number of equal votes is large enough for so many exits."""
        (votes,) = state
        votes = votes + F.one_hot(seen.logits.argmax(dim=-1), seen.logits.shape[-1])
        visited = k + 1 if self.enabled is None else sum(self.enabled[:k]) + 1
        score = votes.amax(dim=-1) / visited**self.power
        if visited == 1:  # below every threshold of use, so that thresholds are not fitted to it
            score = torch.full_like(score, 10 * NEVER)
            return Step(torch.zeros_like(score, dtype=torch.bool), score, seen.logits, (votes,))
        return Step(fires(self, k, score), score, seen.logits, (votes,))
