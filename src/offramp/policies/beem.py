"""BEEM: exits are experts whose weighted confidences add up while neighbours agree."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from offramp.errors import ValueRangeError
from offramp.policies.agreement import Task, agrees, certainty, check_task, nothing_said, said
from offramp.policies.base import Evidence, State, Step, as_flags, as_floats, at_exit, fires

__all__ = ["BEEM"]


@dataclass(frozen=True)
class BEEM:
    """Leave at the first exit k with S_k >= thresholds[k], where confident neighbours that agree add up.

        S_k = S_{k-1} + w_k c_k                     if y_k = y_{k-1}
        S_k = w_k c_k  (reset="own")  or  0  ("zero")    otherwise, and at the first visited exit

    with c_k = max p_k and y_k = argmax p_k. The answer is the leaving exit's own prediction.

    Args:
        weights: one per exit, at least 0. BEEM-C takes weights that rise with depth, BEEM-A the exits' accuracies;
            `calibrate(BEEM, ..., weights="cost" | "accuracy")` computes them.
        thresholds: one per exit, in units of the score; or one value for all. The last is not used.
        reset: what a disagreement leaves: the exit's own evidence, or nothing (the authors' ALBERT code).
        enabled: one flag per exit; None means that all are on. Neighbours are neighbours among those that are on.
        task: "classes", or "multilabel": y is then a set of labels and c the mean certainty of them; or "regression":
            y is the one output, |y_k - y_{k-1}| < tolerance counts as agreement, and c is 1, so that with equal weights
            and reset="zero" the count of agreements decides, as in the authors' code.
        tolerance: for regression, in units of the output; 0 otherwise.

    Source: Bajpai and Hanawal 2025 (BEEM, arXiv 2502.00745), section 3 and figure 1. The authors' code tests one batch
    with `.all()`; its BERT path computes this score but leaves on PABEE's count. Ours decides row by row, by the score.
    """

    weights: tuple[float, ...]
    thresholds: tuple[float, ...] | float
    reset: Literal["own", "zero"] = "own"
    enabled: tuple[bool, ...] | None = None
    task: Task = "classes"
    tolerance: float = 0.0
    needs: ClassVar[tuple[str, ...]] = ()
    per_exit: ClassVar[tuple[str, ...]] = ("weights", "thresholds", "enabled")

    def __post_init__(self) -> None:
        weights = as_floats(self.weights, "weights")
        if not isinstance(weights, tuple) or min(weights) < 0:
            raise ValueRangeError(f"weights is {self.weights!r}; expected one number per exit, each at least 0.")
        if self.reset not in ("own", "zero"):
            raise ValueRangeError(f"reset is {self.reset!r}; expected 'own' or 'zero'.")
        check_task(self.task, self.tolerance)
        object.__setattr__(self, "tolerance", float(self.tolerance))
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "thresholds", as_floats(self.thresholds, "thresholds"))
        object.__setattr__(self, "enabled", as_flags(self.enabled))

    def init(self, seen: Evidence) -> State:
        """(what was said last, see `agreement.said`; S float [batch])."""
        return nothing_said(seen.logits, self.task), torch.zeros_like(seen.logits[:, 0], dtype=torch.float32)

    def step(self, k: int, seen: Evidence, state: State) -> Step:
        """Stop where the evidence gathered so far is at least the threshold of exit k."""
        previous, gathered = state
        label = said(seen.logits, self.task)
        own = at_exit(self.weights, k) * certainty(seen.logits, self.task)
        fresh = own if self.reset == "own" else torch.zeros_like(own)
        score = torch.where(agrees(label, previous, self.task, self.tolerance), gathered + own, fresh)
        return Step(fires(self, k, score), score, seen.logits, (label, score))
