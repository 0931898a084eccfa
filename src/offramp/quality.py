"""What exits and policies are worth beside accuracy at a cost: bounds, regret, overthinking, failure prediction."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from offramp.cost import CostModel
from offramp.scores import max_prob
from offramp.trace import ExitTrace

__all__ = [
    "ExitQuality", "auroc", "ece", "eefp", "exit_quality", "oracle_accuracy", "overthinking", "random_accuracy",
]  # fmt: skip

BINS = 15


@dataclass(frozen=True)
class ExitQuality:
    """One exit alone, on the rows of a trace.

    Args:
        exit: 0-based.
        accuracy: of its own answers.
        ece: expected calibration error of its largest probability, 15 equal bins (Guo et al. 2017).
        eefp: of its largest probability, see `eefp`; None where all rows are of one kind, and at the last exit.
        overthinking: the share of rows that it has right and the last exit has wrong.
    """

    exit: int
    accuracy: float
    ece: float
    eefp: float | None
    overthinking: float


def exit_quality(trace: ExitTrace) -> tuple[ExitQuality, ...]:
    """Every exit alone.

    Raises:
        DataError: the trace has no labels.
    """
    right = _right(trace)
    found = []
    for k in range(trace.exits):
        score = max_prob(trace.logits[k])
        found.append(
            ExitQuality(
                k,
                float(right[k].double().mean()),
                ece(score, right[k]),
                eefp(score, right, k) if k < trace.exits - 1 else None,
                float((right[k] & ~right[-1]).double().mean()),
            )
        )
    return tuple(found)


def ece(confidence: Float[Tensor, "row"], right: Bool[Tensor, "row"]) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy over 15 equal bins of confidence."""
    bins = (confidence * BINS).long().clamp(0, BINS - 1)
    gap = torch.bincount(bins, confidence.double() - right.double(), BINS)
    return float(gap.abs().sum() / len(confidence))


def eefp(score: Float[Tensor, "row"], right: Bool[Tensor, "exit row"], k: int) -> float | None:
    """Early-exit failure prediction: AUROC of exit k's score for "stopping is right here, or going on does not help".

    Going on helps where exit k is wrong and a later one is right.

    Source: arXiv 2508.21495: this goes with the trade-off of accuracy and cost better than calibration does.
    """
    helps = ~right[k] & right[k + 1 :].any(dim=0)
    return auroc(score, ~helps)


def auroc(score: Float[Tensor, "row"], positive: Bool[Tensor, "row"]) -> float | None:
    """The chance that a positive row scores above another, ties by half; None without rows of both kinds."""
    good = int(positive.sum())
    bad = len(positive) - good
    if not good or not bad:
        return None
    values, place = score.double().unique(return_inverse=True)
    wins = torch.bincount(place[positive], minlength=len(values)).double()
    losses = torch.bincount(place[~positive], minlength=len(values)).double()
    below = losses.cumsum(0) - losses
    return float((wins * (below + losses / 2)).sum() / (good * bad))


def overthinking(trace: ExitTrace) -> float:
    """The share of rows that some earlier exit has right and the last one wrong (Kaya et al. 2019).

    Raises:
        DataError: the trace has no labels.
    """
    right = _right(trace)
    return float((right[:-1].any(dim=0) & ~right[-1]).double().mean())


def oracle_accuracy(trace: ExitTrace, costs: CostModel, budget: float) -> float:
    """The accuracy of an oracle at a mean cost: who knows which exits are right, and pays for the cheapest first.

    Every row leaves at once, or goes on to its earliest right exit; sorted by what that costs more, as many rows go on
    as the budget pays for. A row pays for stages and for the one head that answers it. Policies that answer with a
    mixture of exits can be right where no exit is, and better than this.

    Args:
        budget: as a fraction of the plain model's cost.

    Raises:
        DataError: the trace has no labels.
    """
    right = _right(trace)
    alone = torch.eye(costs.exits, dtype=torch.bool).tolist()
    cost = torch.tensor([costs.cumulative(tuple(on))[k] for k, on in enumerate(alone)], dtype=torch.float64)
    first = right.int().argmax(dim=0)
    more = (cost[first] - cost[0])[right.any(dim=0) & (first > 0)].sort().values
    paid = int((more.cumsum(0) <= (budget - float(cost[0])) * trace.rows + 1e-9).sum())
    return (float(right[0].sum()) + paid) / trace.rows


def random_accuracy(trace: ExitTrace, shares: tuple[float, ...]) -> float:
    """The expected accuracy of leaving at random with the same shares, each exit answering for itself.

    Raises:
        DataError: the trace has no labels.
    """
    return sum(share * accuracy for share, accuracy in zip(shares, trace.accuracy(), strict=True))


def _right(trace: ExitTrace) -> Bool[Tensor, "exit row"]:
    return trace.logits.argmax(dim=-1) == trace.known_labels("the quality of exits")
