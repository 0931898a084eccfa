"""Which rows calibrate and which judge: one split in three, or halves in turn."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from offramp.trace import ExitTrace

__all__ = ["Pool", "halves", "thirds"]


@dataclass(frozen=True, eq=False)
class Pool:
    """Disjoint rows of one trace: what a policy is calibrated on, and what it is tested on.

    Args:
        fit: rows to fit on.
        test, test_rows: rows to judge on, and their places among all rows.
        certify: rows that carry promises; None where no target wants them.
    """

    fit: ExitTrace
    test: ExitTrace
    test_rows: Tensor
    certify: ExitTrace | None = None


def thirds(trace: ExitTrace, shares: Sequence[float] = (0.4, 0.3, 0.3), *, seed: int = 0) -> Pool:
    """One pool of disjoint fit, certify and test rows, by seed, the classes in proportion."""
    one, two, three = trace.places(shares, seed=seed)
    return Pool(trace.select(one), trace.select(three), three, trace.select(two))


def halves(trace: ExitTrace, repeats: int = 20, *, seed: int = 0, certify: bool = False) -> tuple[Pool, ...]:
    """Two pools per repeat: a seeded half to calibrate on and the other to test on, then swapped.

    Args:
        certify: whether half of the rows to calibrate on are kept for certificates.
    """
    pools = []
    for repeat in range(repeats):
        parts = trace.places((0.5, 0.5), seed=seed + repeat)
        for one, other in (parts, parts[::-1]):
            fit, kept = trace.select(one), None
            if certify:
                fit, kept = fit.split((0.5, 0.5), seed=seed + repeat)
            pools.append(Pool(fit, trace.select(other), other, kept))
    return tuple(pools)
