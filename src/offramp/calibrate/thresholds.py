"""One threshold shared by every exit, chosen so that the mean cost meets a budget."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from offramp.calibrate.spend import WINDOW, Spend
from offramp.policies.base import NEVER

__all__ = ["Fitted", "SharedScores", "leave"]


@dataclass(frozen=True)
class Fitted:
    """Thresholds per early visited exit, the shares per visited exit that they give, and their mean cost."""

    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    cost: float


def leave(scores: Float[Tensor, "early row"], thresholds: Sequence[float]) -> tuple[float, ...]:
    """The share of rows that leave at each early exit and, last, of those that run to the end."""
    early, rows = scores.shape
    first = torch.full((rows,), early, dtype=torch.int64)
    for k in range(early - 1, -1, -1):
        first[scores[k] >= thresholds[k]] = k
    return tuple((torch.bincount(first, minlength=early + 1).double() / rows).tolist())


class SharedScores:
    """The scores of a trace, sorted once, so that thresholds for many budgets are found by search.

    Args:
        scores: of the early visited exits, rising with confidence.
    """

    def __init__(self, scores: Float[Tensor, "early row"]) -> None:
        self.scores = scores
        # a row leaves by exit k when the largest score so far reaches the threshold
        best = scores.cummax(dim=0).values
        self._sorted = [np.sort(row) for row in best.numpy()]
        found = _unique_sorted(self._sorted)
        self._candidates = found[found > NEVER]

    def shares_at(self, threshold: float) -> tuple[float, ...]:
        """The share of rows that leave at each early exit and at the end, at one threshold for all exits."""
        rows = self.scores.shape[1]
        left = [1.0 - np.searchsorted(row, np.float32(threshold), side="left") / rows for row in self._sorted]
        return tuple(float(b - a) for a, b in itertools.pairwise([0.0, *left, 1.0]))

    def fit(self, spend: Spend, *, apart: bool = True) -> Fitted | None:
        """Thresholds with a large mean cost that is at most the budget; None when even leaving at once costs more.

        A shared threshold comes first. Where ties make its cost jump over the window below the budget, the thresholds
        are raised exit by exit, if they may lie `apart`. They lie midway between scores, so rounding flips few rows.
        """
        low, high = -1, len(self._candidates) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if spend.mean(self.shares_at(_below(self._candidates, middle))) <= spend.limit:
                low = middle
            else:
                high = middle - 1
        if low < 0:
            return None
        early = self.scores.shape[0]
        shared = (_below(self._candidates, low),) * early
        shares = leave(self.scores, shared)
        first = Fitted(shared, shares, spend.mean(shares))
        if first.cost >= WINDOW * spend.amount or not apart:
            return first
        orders = (range(early), range(early - 1, -1, -1))
        return max((first, *(self._raise(first, spend, order) for order in orders)), key=lambda f: f.cost)

    def _raise(self, fitted: Fitted, spend: Spend, order: Iterable[int]) -> Fitted:
        """`fitted` with the thresholds of one exit after the other as high as the budget allows."""
        early, rows = self.scores.shape
        for k in order:
            stop = torch.stack([s >= t for s, t in zip(self.scores, fitted.thresholds, strict=True)])
            here = ~stop[:k].any(dim=0)  # rows that reach exit k
            after = torch.cat([stop[k + 1 :], torch.ones(1, rows, dtype=torch.bool)])[:, here].int().argmax(dim=0)
            score, where = self.scores[k][here].sort()
            # counts[i]: where the i lowest scores would leave if exit k let them pass
            counts = torch.nn.functional.one_hot(after[where], early - k).cumsum(dim=0)
            before = torch.bincount(stop[:k].int().argmax(dim=0)[~here], minlength=k)[:k] if k else torch.zeros(0)
            values, places = np.unique(score.numpy(), return_index=True)
            steps = [_below(values, i) for i in range(1, len(values))] + (
                [_above(float(values[-1]))] if len(values) else []
            )
            passed = [*places[1:].tolist(), len(score)]
            low, high = -1, len(steps) - 1
            while low < high:
                middle = (low + high + 1) // 2
                n = passed[middle]
                full = torch.cat([before, torch.tensor([float(len(score) - n)]), counts[n - 1]]).double() / rows
                cost = spend.mean(tuple(full.tolist()))
                if cost > spend.limit:
                    high = middle - 1
                    continue
                low = middle
                if cost > fitted.cost:
                    thresholds = (*fitted.thresholds[:k], steps[middle], *fitted.thresholds[k + 1 :])
                    fitted = Fitted(thresholds, tuple(full.tolist()), cost)
        return fitted


def _unique_sorted(rows: list[np.ndarray]) -> np.ndarray:
    """The different values of sorted rows, sorted."""
    return np.unique(np.concatenate(rows)) if rows else np.zeros(0, dtype=np.float32)


def _above(score: float) -> float:
    """A threshold that no row of the trace reaches."""
    return float(np.float32(score + 1e-3 * (1.0 + abs(score))))


def _below(candidates: np.ndarray, index: int) -> float:
    """A float32 threshold that takes candidates[index] and leaves candidates[index - 1], midway if there is room."""
    here = np.float32(candidates[index])
    if index == 0:
        return float(here)
    below = np.float32(candidates[index - 1])
    middle = np.float32((np.float64(here) + np.float64(below)) / 2)
    return float(middle if middle > below else here)
