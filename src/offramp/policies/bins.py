"""Accuracy control: leave where rows of this confidence have been right often enough."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from offramp.errors import ShapeError, ValueRangeError
from offramp.policies.base import Evidence, State, Step, as_flags, as_floats, fires
from offramp.scores import max_prob

__all__ = ["AccuracyBins"]


@dataclass(frozen=True)
class AccuracyBins:
    """Leave at the first exit k with a_k(c) >= thresholds[k]: the accuracy of the bin that c = max p lies in.

    Args:
        edges: per exit the rising lower edges of its bins but the first.
        accuracies: per exit the accuracy of each bin on calibration rows, one more than its edges.
        thresholds: the accuracy that is asked for: one value for all (the paper's delta), or one per exit.
        enabled: one flag per exit; None means that all are on.

    Source: Zhang et al. 2024 (performance control in PCEE), abstract: bins of equal mass, leave if the bin's validation
    accuracy is at least delta. Ours makes the accuracies rise with confidence (isotonic regression) unless told
    otherwise, so that a bin that was lucky does not open alone.
    """

    edges: tuple[tuple[float, ...], ...]
    accuracies: tuple[tuple[float, ...], ...]
    thresholds: tuple[float, ...] | float
    enabled: tuple[bool, ...] | None = None
    needs: ClassVar[tuple[str, ...]] = ()
    per_exit: ClassVar[tuple[str, ...]] = ("edges", "accuracies", "thresholds", "enabled")

    def __post_init__(self) -> None:
        edges = tuple(_row(row, "edges") for row in self.edges)
        accuracies = tuple(_row(row, "accuracies") for row in self.accuracies)
        if not edges or [len(row) + 1 for row in edges] != [len(row) for row in accuracies]:
            raise ShapeError(
                f"edges have {[len(row) for row in edges]} and accuracies {[len(row) for row in accuracies]} entries; "
                "expected, for every exit, one accuracy more than edges."
            )
        if any(list(row) != sorted(row) for row in edges):
            raise ValueRangeError("edges must rise at every exit.")
        object.__setattr__(self, "edges", edges)
        object.__setattr__(self, "accuracies", accuracies)
        object.__setattr__(self, "thresholds", as_floats(self.thresholds, "thresholds"))
        object.__setattr__(self, "enabled", as_flags(self.enabled))

    def init(self, seen: Evidence) -> State:
        """No state."""
        return ()

    def step(self, k: int, seen: Evidence, state: State) -> Step:
        """Stop where the accuracy of the row's bin is at least the threshold of exit k."""
        confidence = max_prob(seen.logits)
        edges = torch.tensor(self.edges[k], dtype=torch.float32, device=confidence.device)
        accuracies = torch.tensor(self.accuracies[k], dtype=torch.float32, device=confidence.device)
        score = accuracies[(confidence[:, None] >= edges).sum(dim=-1)]
        return Step(fires(self, k, score), score, seen.logits, state)


def _row(values: object, name: str) -> tuple[float, ...]:
    found = as_floats(values, name) if values != () and values != [] else ()
    if not isinstance(found, tuple):
        raise ShapeError(f"{name} holds {values!r}; expected numbers for every exit.")
    return found
