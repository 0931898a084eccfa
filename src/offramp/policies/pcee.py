"""PCEE: patience over exits that are confident."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from offramp.errors import ValueRangeError
from offramp.policies.base import Evidence, State, Step, as_flags
from offramp.scores import neg_entropy

__all__ = ["PCEE"]


@dataclass(frozen=True)
class PCEE:
    """Leave at the first exit with m >= patience, where m counts how many exits in a row were confident.

        m_k = m_{k-1} + 1   if 1 + sum_c p_kc log p_kc / log cls >= tau
        m_k = 0             otherwise; the first visited exit counts from 0

    With patience 1 this is the entropy policy with one threshold for all exits.

    Args:
        tau: confidence, 1 is certain and 0 uniform; `calibrate` tunes it together with `patience`.
        patience: confident exits in a row that are needed, at least 1.
        enabled: one flag per exit; None means that all are on.

    Source: Zhang et al. 2022 (PCEE-BERT, Findings of NAACL), abstract. Theirs compares the entropy with `<`; ours is
    turned over and normalised, as in `Entropy`.
    """

    tau: float
    patience: int = 1
    enabled: tuple[bool, ...] | None = None
    needs: ClassVar[tuple[str, ...]] = ()
    per_exit: ClassVar[tuple[str, ...]] = ("enabled",)

    def __post_init__(self) -> None:
        if not isinstance(self.patience, int) or isinstance(self.patience, bool) or self.patience < 1:
            raise ValueRangeError(f"patience is {self.patience!r}; expected a whole number of exits, at least 1.")
        number = isinstance(self.tau, int | float) and not isinstance(self.tau, bool)
        if not number or not abs(self.tau) < float("inf"):
            raise ValueRangeError(f"tau is {self.tau!r}; expected a finite number.")
        object.__setattr__(self, "tau", float(self.tau))
        object.__setattr__(self, "enabled", as_flags(self.enabled))

    @property
    def thresholds(self) -> float:
        """The count that is needed, as the threshold of the score."""
        return float(self.patience)

    def init(self, seen: Evidence) -> State:
        """(confident exits in a row int64 [batch],)."""
        return (torch.zeros_like(seen.logits[:, 0], dtype=torch.int64),)

    def step(self, k: int, seen: Evidence, state: State) -> Step:
        """Stop where the count of confident exits has reached `patience`."""
        (confident,) = state
        confident = torch.where(neg_entropy(seen.logits) >= self.tau, confident + 1, 0)
        stop = confident >= self.patience
        if self.enabled is not None and not self.enabled[k]:
            stop = torch.zeros_like(stop)
        return Step(stop, confident.float(), seen.logits, (confident,))
