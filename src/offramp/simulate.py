"""A policy over a recorded trace: the same steps as the live runtime, on all rows at once."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from offramp.cost import CostModel
from offramp.errors import ShapeError
from offramp.policies.base import Evidence, Policy, check_exits, visits
from offramp.trace import ExitTrace

__all__ = ["Outcome", "Walk", "simulate", "walk"]


@dataclass(frozen=True, eq=False)
class Walk:
    """What a policy said at every visited exit, before anybody left.

    Args:
        visited: the exits visited, 0-based and rising.
        stop: bool [visit row].
        score: float [visit row].
        answer: float [visit row cls].
    """

    visited: tuple[int, ...]
    stop: Bool[Tensor, "visit row"]
    score: Float[Tensor, "visit row"]
    answer: Float[Tensor, "visit row cls"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a policy did with a trace.

    Args:
        exit: the exit at which each row left, int64 [row].
        answer: the logits it was answered with, float [row cls].
        score: the policy's score there, float [row].
        cost: the mean cost a row, as a fraction of the plain model's.
        shares: the share of rows that left at each exit.
        accuracy: the share of rows answered rightly, or None without labels.
        right: bool [row], or None without labels.
    """

    exit: Int64[Tensor, "row"]
    answer: Float[Tensor, "row cls"]
    score: Float[Tensor, "row"]
    cost: float
    shares: tuple[float, ...]
    accuracy: float | None
    right: Bool[Tensor, "row"] | None


def walk(policy: Policy, trace: ExitTrace) -> Walk:
    """Every visited exit's steps on all rows of the trace.

    Raises:
        ShapeError: the policy is for another number of exits, or needs signals that the trace lacks.
    """
    check_exits(policy, trace.exits)
    signals = trace.signals_for(policy.needs)
    visited = visits(policy, trace.exits)
    state, steps = None, []
    for k in visited:
        seen = Evidence(trace.logits[k], None if signals is None else signals[k])
        step = policy.step(k, seen, policy.init(seen) if state is None else state)
        state = step.state
        steps.append(step)
    stop = torch.stack([s.stop for s in steps])
    stop[-1] = True  # the last exit always stops
    return Walk(visited, stop, torch.stack([s.score for s in steps]), torch.stack([s.answer for s in steps]))


def simulate(policy: Policy, trace: ExitTrace, costs: CostModel) -> Outcome:
    """Where every row leaves, with which answer, and what that costs.

    Example:
        >>> trace = ExitTrace(logits=torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]]), labels=torch.tensor([1]))
        >>> simulate(MaxProb(thresholds=(0.9, 0.0)), trace, CostModel.from_costs((0.5, 1.0))).exit.tolist()
        [1]
    """
    if costs.exits != trace.exits:
        raise ShapeError(f"the cost model has {costs.exits} exits and the trace {trace.exits}. Measure the same model.")
    walked = walk(policy, trace)
    first = walked.stop.int().argmax(dim=0)
    rows = torch.arange(trace.rows)
    answer = walked.answer[first, rows]
    exit_ = torch.tensor(walked.visited)[first]
    shares = torch.bincount(exit_, minlength=trace.exits).double() / trace.rows
    spent = torch.tensor(costs.cumulative(policy.enabled), dtype=torch.float64)[exit_]
    right = None if trace.labels is None else answer.argmax(dim=-1) == trace.labels
    return Outcome(
        exit=exit_,
        answer=answer,
        score=walked.score[first, rows],
        cost=float(spent.mean()),
        shares=tuple(shares.tolist()),
        accuracy=None if right is None else float(right.double().mean()),
        right=right,
    )
