"""BERxiT: leave when a learned head is certain that the exit is right."""

from dataclasses import dataclass
from typing import ClassVar

from offramp.errors import ShapeError
from offramp.policies.base import Evidence, State, Step, as_flags, as_floats, fires

__all__ = ["BERxiT"]


@dataclass(frozen=True)
class BERxiT:
    """Leave at the first exit k with 1 - u_k >= thresholds[k], where u_k = sigmoid(c_k . h_k + b_k) was learned.

    u_k predicts whether exit k is wrong, from the features that its classifier sees. The model must have the signal
    "certainty" (1 - u), which `learn_certainty` trains.

    Args:
        thresholds: one per exit, in [0, 1]; or one value for all. The last is not used.
        enabled: one flag per exit; None means that all are on.

    Source: Xin et al. 2021 (BERxiT, EACL), section 3.3, and the released code. Theirs shares c and b between exits and
    trains them in turns with the exits; ours has one per exit, because exits differ in width, and trains them after the
    exits, which stay as they are.
    """

    thresholds: tuple[float, ...] | float
    enabled: tuple[bool, ...] | None = None
    needs: ClassVar[tuple[str, ...]] = ("certainty",)
    per_exit: ClassVar[tuple[str, ...]] = ("thresholds", "enabled")

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", as_floats(self.thresholds, "thresholds"))
        object.__setattr__(self, "enabled", as_flags(self.enabled))

    def init(self, seen: Evidence) -> State:
        """No state."""
        return ()

    def step(self, k: int, seen: Evidence, state: State) -> Step:
        """Stop where the learned certainty is at least the threshold of exit k.

        Raises:
            ShapeError: the evidence has no signal.
        """
        if seen.signals is None or seen.signals.shape[-1] != 1:
            raise ShapeError(
                "BERxiT needs the signal 'certainty' [batch 1]; this evidence has none. Learn and record it."
            )
        score = seen.signals[:, 0].float()
        return Step(fires(self, k, score), score, seen.logits, state)
