"""Tests of whether two groups of rows are of one kind, and their joint level."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

__all__ = ["Test", "band_distance", "holm", "ks_p", "shares_test", "visible_distance"]

EXACT = 20_000  # rows on both sides together up to which a p-value is counted out


@dataclass(frozen=True)
class Test:
    """One test: its name, its statistic, its p-value, and whether it rejects (Holm's procedure over all tests)."""

    __test__ = False  # a test of statistics, not of ours

    name: str
    statistic: float
    p: float
    rejected: bool


def ks_p(apart: int, rows: int, others: int) -> float:
    """The chance that two samples of one distribution are so far apart: P(max |i others - j rows| >= apart) over the
    counts i and j of either sample up to a value.

    Counted out along the pooled order up to 20,000 rows together, by the bound 2 exp(-2 z^2) beyond. Ties make the
    true chance smaller.

    Source: Hodges 1958, "The significance probability of the Smirnov two-sample test".
    """
    if rows + others <= EXACT:
        return _ks_counted(apart, *sorted((rows, others)))
    return min(1.0, 2 * math.exp(-2 * apart * apart / (rows * others * (rows + others))))


def band_distance(
    points: Float[np.ndarray, "point"], ranks: Int[np.ndarray, "point"], rows: int, values: Float[np.ndarray, "new"]
) -> int:
    """The largest distance, in units of 1 / (rows new), between the distribution of new values and the band that the
    other's must lie in, when `points` are its order statistics with these ranks (1-based) among `rows` values.

    With all ranks known the band is the other's distribution, and the distance is Kolmogorov's and Smirnov's; with
    fewer it is never larger, so that its p-value errs on the safe side.
    """
    others = len(values)
    places = np.union1d(points, values)
    after = np.searchsorted(np.sort(values), places, side="right")
    known = np.searchsorted(points, places, side="right")
    # so many of the other values lie at or below a place: at least `low`, and fewer than the rank of the next point
    low, high = np.concatenate([[0], ranks])[known], np.concatenate([ranks - 1, [rows]])[known]
    return max(0, int((after * rows - high * others).max()), int((low * others - after * rows).max()))


@lru_cache(maxsize=4096)
def _ks_counted(apart: int, few: int, many: int) -> float:
    """A row of the smaller sample comes next with the chance of a draw without replacement; what strays is counted."""
    total, first, lost = few + many, 0, 0.0
    if apart <= 0:
        return 1.0
    mass = np.ones(1)  # mass[n]: the chance that first + n of the rows so far are of the smaller sample, none strayed
    for drawn in range(total):
        count = np.arange(first, first + len(mass))
        up = mass * ((few - count) / (total - drawn))
        mass = np.append(mass - up, 0.0)
        mass[1:] += up
        centre = (drawn + 1) * few
        low, high = (centre - apart) // total + 1 - first, -((-centre - apart) // total) - 1 - first
        low, high = max(low, 0), min(high, len(mass) - 1)
        if high < low:
            return 1.0
        lost += float(mass[:low].sum() + mass[high + 1 :].sum())
        mass, first = mass[low : high + 1], first + low
    return min(1.0, lost)


def shares_test(before: tuple[int, ...], after: tuple[int, ...], draws: int, seed: int) -> tuple[float, float]:
    """(G, p-value) of two rows of counts [exit]: Monte Carlo over permutations, so small counts are no matter."""
    pooled = np.asarray(before) + np.asarray(after)
    pooled, counts = pooled[pooled > 0], np.asarray(after)[pooled > 0]
    rows, total = int(counts.sum()), int(pooled.sum())
    drawn = np.random.default_rng(seed).multivariate_hypergeometric(pooled, rows, size=draws)
    seen, all_drawn = (_g(each, pooled, rows / total) for each in (counts[None], drawn))
    reached = int((all_drawn >= seen[0] * (1 - 1e-9) - 1e-9).sum())
    return float(seen[0]), (1 + reached) / (1 + draws)


def _g(counts: np.ndarray, pooled: np.ndarray, share: float) -> np.ndarray:
    """G = 2 sum O log(O / E) over both rows of the table, of many tables at once, float64 [draw]."""
    found = np.zeros(len(counts))
    for observed, part in ((counts, share), (pooled - counts, 1 - share)):
        ratio = np.where(observed > 0, observed / (pooled * part), 1.0)
        found += 2 * (observed * np.log(ratio)).sum(axis=1)
    return np.maximum(found, 0.0)


def holm(found: list[tuple[str, float, float]], level: float) -> tuple[Test, ...]:
    """The tests, the smallest p-values rejected as long as each is at most level / (tests that are left)."""
    order = sorted(range(len(found)), key=lambda i: found[i][2])
    rejected: set[int] = set()
    for place, i in enumerate(order):
        if found[i][2] > level / (len(found) - place):
            break
        rejected.add(i)
    return tuple(Test(name, s, p, i in rejected) for i, (name, s, p) in enumerate(found))


def visible_distance(rows: int, others: int, tests: int, level: float) -> float:
    """The distance between samples that a KS test rejects at level / tests, by the bound 2 exp(-2 z^2)."""
    return math.sqrt(math.log(2 * tests / level) / 2 * (rows + others) / (rows * others))
