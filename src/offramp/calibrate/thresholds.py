"""One threshold shared by every exit, chosen so that the mean cost meets a budget."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from offramp.calibrate.spend import WINDOW, Spend

__all__ = ["Fitted", "fit_thresholds", "leave"]


@dataclass(frozen=True)
class Fitted:
    """Thresholds per early visited exit, the shares per visited exit that they give, and their mean cost."""

    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    cost: float


def leave(scores: Float[Tensor, "early row"], thresholds: tuple[float, ...]) -> tuple[float, ...]:
    """The share of rows that leave at each early exit and, last, of those that run to the end."""
    early, rows = scores.shape
    stop = scores >= torch.tensor(thresholds, dtype=scores.dtype)[:, None]
    stop = torch.cat([stop, torch.ones(1, rows, dtype=torch.bool)])
    first = stop.int().argmax(dim=0)
    return tuple((torch.bincount(first, minlength=early + 1).double() / rows).tolist())


def fit_thresholds(scores: Float[Tensor, "early row"], spend: Spend) -> Fitted | None:
    """Thresholds with a large mean cost that is at most the budget, or None when even leaving at once costs more.

    A shared threshold comes first. Where ties make its cost jump over the window below the budget, the thresholds are
    raised exit by exit. They lie midway between scores, so that rounding flips few rows.
    """
    early = scores.shape[0]
    # a row leaves by exit k when the largest score so far reaches the threshold, so sorted maxima give shares by search
    best = scores.cummax(dim=0).values
    sorted_best = [np.sort(row) for row in best.numpy()]
    candidates = np.unique(np.concatenate(sorted_best))
    rows = scores.shape[1]

    def shares_at(threshold: float) -> tuple[float, ...]:
        left = [1.0 - np.searchsorted(row, np.float32(threshold), side="left") / rows for row in sorted_best]
        cumulative = [0.0, *left, 1.0]
        return tuple(float(b - a) for a, b in itertools.pairwise(cumulative))

    low, high = -1, len(candidates) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if spend.mean(shares_at(_below(candidates, middle))) <= spend.limit:
            low = middle
        else:
            high = middle - 1
    if low < 0:
        return None
    shared = (_below(candidates, low),) * early
    first = Fitted(shared, leave(scores, shared), spend.mean(leave(scores, shared)))
    if first.cost >= WINDOW * spend.amount:
        return first
    orders = (range(early), range(early - 1, -1, -1))
    return max((first, *(_raise(scores, first, spend, order) for order in orders)), key=lambda f: f.cost)


def _raise(scores: Float[Tensor, "early row"], fitted: Fitted, spend: Spend, order: Iterable[int]) -> Fitted:
    """`fitted` with the thresholds of one exit after the other as high as the budget allows."""
    for k in order:
        values = np.unique(scores[k].numpy())
        steps = [_below(values, i) for i in range(1, len(values))] + [_above(float(values[-1]))]
        low, high = -1, len(steps) - 1
        while low < high:
            middle = (low + high + 1) // 2
            thresholds = (*fitted.thresholds[:k], steps[middle], *fitted.thresholds[k + 1 :])
            shares = leave(scores, thresholds)
            cost = spend.mean(shares)
            if cost > spend.limit:
                high = middle - 1
                continue
            low = middle
            if cost > fitted.cost:
                fitted = Fitted(thresholds, shares, cost)
    return fitted


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
