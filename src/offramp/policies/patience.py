"""Leave when enough neighbouring exits in a row agree."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from offramp.errors import ValueRangeError
from offramp.policies.agreement import Task, agrees, check_task, nothing_said, said
from offramp.policies.base import Evidence, State, Step, as_flags

__all__ = ["Patience"]


@dataclass(frozen=True)
class Patience:
    """Leave at the first exit with m >= patience, where m counts how often in a row the label stayed the same.

        m_k = m_{k-1} + 1   if y_k = y_{k-1}
        m_k = 0             otherwise, and at the first visited exit

    Args:
        patience: agreements in a row that are needed, at least 0. It is compared with `>=`.
        enabled: one flag per exit; None means that all are on. Neighbours are neighbours among those that are on.
        task: "classes": y is the most probable class. "regression": y is the one output, and |y_k - y_{k-1}| <
            tolerance counts as the same. "multilabel": y is the set of labels with a probability above a half.
        tolerance: for regression, in units of the output; 0 otherwise.

    Source: Zhou et al. 2020 (PABEE, "BERT Loses Patience"), section 3.2. The authors' code tests one batch with
    `.all()`; ours decides row by row.
    """

    patience: int
    enabled: tuple[bool, ...] | None = None
    task: Task = "classes"
    tolerance: float = 0.0
    needs: ClassVar[tuple[str, ...]] = ()
    per_exit: ClassVar[tuple[str, ...]] = ("enabled",)

    def __post_init__(self) -> None:
        if not isinstance(self.patience, int) or isinstance(self.patience, bool) or self.patience < 0:
            raise ValueRangeError(f"patience is {self.patience!r}; expected a whole number of agreements, at least 0.")
        check_task(self.task, self.tolerance)
        object.__setattr__(self, "tolerance", float(self.tolerance))
        object.__setattr__(self, "enabled", as_flags(self.enabled))

    @property
    def thresholds(self) -> float:
        """The count that is needed, as the threshold of the score."""
        return float(self.patience)

    def init(self, seen: Evidence) -> State:
        """(what was said last, see `agreement.said`; agreements int64 [batch])."""
        return nothing_said(seen.logits, self.task), torch.zeros_like(seen.logits[:, 0], dtype=torch.int64)

    def step(self, k: int, seen: Evidence, state: State) -> Step:
        """Stop where the count of agreements has reached `patience`."""
        previous, agreements = state
        label = said(seen.logits, self.task)
        agreements = torch.where(agrees(label, previous, self.task, self.tolerance), agreements + 1, 0)
        stop = agreements >= self.patience
        if self.enabled is not None and not self.enabled[k]:
            stop = torch.zeros_like(stop)
        return Step(stop, agreements.float(), seen.logits, (label, agreements))
