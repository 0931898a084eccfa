"""EERO: max-prob, with thresholds that are quantiles of rows without labels."""

from dataclasses import dataclass

from offramp.policies.confidence import MaxProb

__all__ = ["EERO"]


@dataclass(frozen=True)
class EERO(MaxProb):
    """Leave at exit k if the score is among the top e_k of rows that arrive there.

        s_k proportional to s0_k exp(-beta (R_k + mu b_k)),     e_k = s_k / (1 - sum_{j<k} s_j)

    R_k is exit k's error rate, b_k its cost, s0 uniform, and mu is found by bisection on the budget. The quantiles
    become thresholds, so that a row is decided alone. Only R needs labels: where they are known from earlier rows, the
    thresholds are found on rows without.

    Args:
        thresholds: one per exit, in probabilities; or one value for all. The last is not used.
        enabled: one flag per exit; None means that all are on.

    Source: Valade et al. 2024 (EERO, arXiv 2402.03779), from general knowledge of the paper. Theirs ranks rows inside a
    batch; ours takes quantiles of the calibration rows.
    """
