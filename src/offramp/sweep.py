"""Many policies over one trace: those that differ in their thresholds alone share one walk."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from offramp.cost import CostModel
from offramp.errors import ShapeError
from offramp.policies.base import NEVER, Policy, at_exit, check_exits
from offramp.simulate import Walk, simulate, walk
from offramp.trace import ExitTrace

__all__ = ["Said", "Sweep", "family_key", "first_stop", "shares_of"]


@dataclass(frozen=True, eq=False)
class Said:
    """What a policy did with a trace, without the answers' probabilities.

    Args:
        exit: the exit at which each row left, int64 [row].
        said: the class it was answered with, int64 [row].
        shares: the share of rows that left at each exit.
        cost: the mean cost a row, as a fraction of the plain model's.
    """

    exit: Int64[Tensor, "row"]
    said: Int64[Tensor, "row"]
    shares: tuple[float, ...]
    cost: float


class Sweep:
    """`simulate` for many policies over one trace, the last walk being kept for policies that only move thresholds.

    It is the same steps: where the policy is not stopped, its scores and answers do not depend on thresholds (law 6 and
    `tests/parity`), so the thresholds are compared with the scores of one walk.
    """

    def __init__(self, trace: ExitTrace, costs: CostModel) -> None:
        if costs.exits != trace.exits:
            raise ShapeError(f"the cost model has {costs.exits} exits and the trace {trace.exits}. Measure the same.")
        self.trace = trace
        self.costs = costs
        self._kept: tuple[Any, Walk, Tensor] | None = None

    def __call__(self, policy: Policy) -> Said:
        """What a policy does with the trace.

        Raises:
            ShapeError: the policy is for another number of exits.
        """
        check_exits(policy, self.trace.exits)
        key = family_key(policy)
        if key is None:
            outcome = simulate(policy, self.trace, self.costs)
            return Said(outcome.exit, outcome.answer.argmax(dim=-1), outcome.shares, outcome.cost)
        if self._kept is None or self._kept[0] != key:
            walked = walk(policy, self.trace)
            self._kept = (key, walked, walked.answer.argmax(dim=-1))
        _, walked, said = self._kept
        thresholds = policy.thresholds  # type: ignore[attr-defined]
        first = first_stop(walked.score, [at_exit(thresholds, k) for k in walked.visited[:-1]])
        exit_ = torch.tensor(walked.visited)[first]
        shares = shares_of(exit_, self.trace.exits)
        spent = sum(s * c for s, c in zip(shares, self.costs.cumulative(policy.enabled), strict=True))
        return Said(exit_, said.gather(0, first[None])[0], shares, spent)


def first_stop(scores: Float[Tensor, "visit row"], thresholds: Sequence[float]) -> Int64[Tensor, "row"]:
    """The first of the visited exits whose score is at least its threshold; the last takes the rest."""
    rows = scores.shape[1]
    first = torch.full((rows,), len(thresholds), dtype=torch.int64)
    for k in range(len(thresholds) - 1, -1, -1):
        first = torch.where((scores[k] >= thresholds[k]) & (scores[k] > NEVER), k, first)
    return first


def shares_of(exit_: Int64[Tensor, "row"], exits: int) -> tuple[float, ...]:
    """The share of rows that left at each exit."""
    return tuple((torch.bincount(exit_, minlength=exits).double() / len(exit_)).tolist())


def family_key(policy: Policy) -> Any:
    """Equal for policies that differ in their thresholds alone; None where a rule is more than a comparison."""
    names = [f.name for f in dataclasses.fields(policy)]  # type: ignore[arg-type]
    if "thresholds" not in names:
        return None
    return (type(policy), *(getattr(policy, name) for name in names if name != "thresholds"))
