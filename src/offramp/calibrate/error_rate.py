"""BEEM's thresholds: rows that leave at an exit must err no more often than the final exit does."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from offramp.calibrate.bounds import binomial_cdf
from offramp.errors import ValueRangeError
from offramp.policies.base import Evidence, Policy
from offramp.simulate import walk
from offramp.trace import ExitTrace

__all__ = ["ErrorRate", "fit_error_rate"]


@dataclass(frozen=True)
class ErrorRate:
    """The target that rows leaving early err no more often than the final exit.

    Args:
        rows: the final exit's error rate on "all" rows, or on the "same" rows that leave.
        shared: one threshold for all exits, for all rows that leave early together; otherwise one per exit.
        confidence: None compares plain rates. A number such as 0.95 asks that the one-sided Clopper-Pearson upper bound
            of the rate is not above. With rows="same" the final exit's rate on those rows is taken as known. Of many
            thresholds the lowest that passes is taken, so it fails on new rows more often than one chosen beforehand
            would: this is caution, not a promise. For a promise ask for a `Risk`.

    Source: Bajpai and Hanawal 2025 (BEEM), abstract and section 3: thresholds are set from error rates "aiming to
    surpass" the final exit. The paper's exact procedure could not be read; this is ours.
    """

    rows: Literal["all", "same"] = "all"
    shared: bool = False
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.rows not in ("all", "same"):
            raise ValueRangeError(f"rows is {self.rows!r}; expected 'all' or 'same'.")
        if self.confidence is not None and not 0.5 <= self.confidence < 1:
            raise ValueRangeError(f"confidence is {self.confidence!r}; expected None or a number from 0.5 to below 1.")

    def __str__(self) -> str:
        return f"error rate of leaving rows at most the final exit's on {self.rows} rows"


def fit_error_rate(policy: Policy, trace: ExitTrace, target: ErrorRate) -> Policy:
    """The policy with the smallest thresholds that meet the target; exits that never meet it are switched off."""
    right = trace.logits.argmax(dim=-1) == trace.known_labels("calibrating to an error rate")
    if target.shared:
        return _fit_shared(policy, trace, right, target)
    rows, exits = trace.rows, trace.exits
    left = torch.ones(rows, dtype=torch.bool)
    thresholds, enabled, state = [0.0] * exits, [True] * exits, None
    probe: Any = dataclasses.replace(policy, thresholds=0.0)  # type: ignore[type-var]
    signals = trace.signals_for(policy.needs)
    for k in range(exits - 1):
        seen = Evidence(trace.logits[k], None if signals is None else signals[k])
        step = probe.step(k, seen, probe.init(seen) if state is None else state)
        answered = step.answer.argmax(dim=-1) == trace.labels
        threshold = None
        if policy.enabled is None or policy.enabled[k]:
            threshold = _smallest(step.score[left], ~answered[left], ~right[-1], left, target)
        enabled[k] = threshold is not None
        if threshold is None:
            continue  # a switched-off exit is not visited: its state must not pass on
        state = step.state
        thresholds[k] = threshold
        left &= step.score < threshold  # once nobody is left, later exits have no evidence and stay off
    return dataclasses.replace(policy, thresholds=tuple(thresholds), enabled=tuple(enabled))  # type: ignore[type-var]


def _smallest(
    score: Float[Tensor, "left"],
    wrong: Bool[Tensor, "left"],
    final_wrong: Bool[Tensor, "row"],
    left: Bool[Tensor, "row"],
    target: ErrorRate,
) -> float | None:
    """The smallest threshold whose takers err no more often than allowed, or None."""
    if not len(score):
        return None
    order = score.argsort(descending=True, stable=True)
    ordered = score[order]
    taken = torch.arange(1, len(ordered) + 1, dtype=torch.float64)
    errors = wrong[order].double().cumsum(0)
    if target.rows == "same":
        allowed = final_wrong[left][order].double().cumsum(0) / taken
    else:
        allowed = final_wrong.double().mean().expand(len(ordered))
    good = errors <= allowed * taken + 1e-9
    good[:-1] &= ordered[:-1] > ordered[1:]  # rows of one score leave together
    candidates = good.nonzero()[:, 0].tolist()
    for last in reversed(candidates):
        if target.confidence is None or _bounded(
            int(errors[last]), int(taken[last]), float(allowed[last]), target.confidence
        ):
            return float(ordered[last])
    return None


def _bounded(errors: int, taken: int, allowed: float, confidence: float) -> bool:
    """Whether the one-sided Clopper-Pearson upper bound of errors/taken is at most `allowed`: the binomial chance of so
    few errors at rate `allowed` is at most 1 - confidence."""
    if not 0.0 < allowed < 1.0:
        return allowed >= 1.0
    return binomial_cdf(errors, taken, allowed) <= 1 - confidence


def _fit_shared(policy: Policy, trace: ExitTrace, right: Bool[Tensor, "exit row"], target: ErrorRate) -> Policy:
    probe: Any = dataclasses.replace(policy, thresholds=0.0)  # type: ignore[type-var]
    walked = walk(probe, trace)
    early = walked.score[:-1]
    wrong = torch.ne(walked.answer.argmax(dim=-1), trace.known_labels("calibrating to an error rate"))
    found = None
    if early.numel():
        levels = torch.linspace(0, 1, 513, dtype=torch.float64)
        for threshold in torch.quantile(early.flatten().double(), levels).tolist():
            stop = torch.cat([early >= threshold, torch.ones(1, trace.rows, dtype=torch.bool)])
            first = stop.int().argmax(dim=0)
            gone = first < len(early)
            errors, taken = int((wrong.gather(0, first[None])[0] & gone).sum()), int(gone.sum())
            base = ~right[-1] if target.rows == "all" else ~right[-1][gone]
            allowed = float(base.double().mean()) if len(base) else 0.0
            bounded = target.confidence is None or _bounded(errors, taken, allowed, target.confidence)
            if taken and errors <= allowed * taken + 1e-9 and bounded:
                found = threshold
                break
    exits = trace.exits
    enabled = policy.enabled if found is not None else (False,) * (exits - 1) + (True,)
    return dataclasses.replace(policy, thresholds=(found or 0.0,) * exits, enabled=enabled)  # type: ignore[type-var]
