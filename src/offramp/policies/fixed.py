"""Every row leaves at the same exit: the model cut short."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from offramp.errors import ValueRangeError
from offramp.policies.base import Evidence, State, Step

__all__ = ["Fixed"]


@dataclass(frozen=True)
class Fixed:
    """Every row leaves at one exit; no other head runs. What a smaller model would do, and a bound to beat.

    Args:
        exit: 0-based.
        exits: E, the number of exits of the model.
    """

    exit: int
    exits: int
    needs: ClassVar[tuple[str, ...]] = ()
    per_exit: ClassVar[tuple[str, ...]] = ("enabled",)

    def __post_init__(self) -> None:
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (self.exit, self.exits))
        if not whole or not 0 <= self.exit < self.exits:
            raise ValueRangeError(
                f"exit is {self.exit!r} of {self.exits!r}; expected a whole number from 0 to exits - 1."
            )

    @property
    def enabled(self) -> tuple[bool, ...]:
        """The one exit is on, and the last."""
        return tuple(k in (self.exit, self.exits - 1) for k in range(self.exits))

    @property
    def thresholds(self) -> float:
        """The score of every row is 1, and this is 1."""
        return 1.0

    def init(self, seen: Evidence) -> State:
        """No state."""
        return ()

    def step(self, k: int, seen: Evidence, state: State) -> Step:
        """Stop everywhere at `exit`."""
        score = torch.ones_like(seen.logits[:, 0], dtype=torch.float32)
        return Step(score >= (1.0 if k == self.exit else 2.0), score, seen.logits, state)
