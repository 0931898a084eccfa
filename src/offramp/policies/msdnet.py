"""MSDNet's budgeted rule: max-prob, with thresholds from geometric exit shares."""

from dataclasses import dataclass

from offramp.policies.confidence import MaxProb

__all__ = ["MSDNet"]


@dataclass(frozen=True)
class MSDNet(MaxProb):
    """Leave at the first exit k with max_c p_kc >= thresholds[k], the thresholds coming from shares.

    The rule is `MaxProb`'s. What differs is the calibration: the share of rows that leave at exit k is proportional to
    q^k (k from 1), each threshold takes its share of the rows not yet taken, the most confident first, and q is swept
    until the mean cost meets the budget.

    Args:
        thresholds: one per exit, in probabilities; or one value for all. The last is not used.
        enabled: one flag per exit; None means that all are on.

    Source: Huang et al. 2018 (MSDNet), section 4, "budgeted batch classification", and the released code. Their shares
    are of the rows that arrive; over all exits both are geometric.
    """
