"""Thresholds moved to new rows without labels."""

import dataclasses

import torch

from offramp.calibrate.quotas import Quotas
from offramp.calibrate.spend import WINDOW, Spend
from offramp.check.kept import Reference, fitting
from offramp.cost import Budget, CostModel
from offramp.errors import ValueRangeError
from offramp.policies import Policy
from offramp.policies.base import at_exit
from offramp.simulate import walk
from offramp.trace import ExitTrace

__all__ = ["recalibrate_quantiles"]


def recalibrate_quantiles(
    policy: Policy,
    before: Reference | ExitTrace,
    new: ExitTrace,
    costs: CostModel,
    budget: Budget | None = None,
) -> Policy:
    """The policy with thresholds at which the same share of the new rows leaves at each exit as of the old ones; with a
    budget, shares as near to those as spend 98 to 100 % of it. An exit that nobody took is not taken then.

    No labels are needed, so only the cost is restored: **what was promised about accuracy does not carry over**. That
    takes labelled rows of the new kind and `calibrate`.

    Raises:
        ShapeError: exits or classes differ.
        ValueRangeError: the policy has no threshold per exit, the reference is another policy's, or no shares of the
            exits that were taken before meet the budget.
    """
    if "thresholds" not in {f.name for f in dataclasses.fields(policy)}:  # type: ignore[arg-type]
        raise ValueRangeError(
            f"{type(policy).__name__} has no threshold per exit to move. Take max-prob, entropy, BEEM or EENet, or "
            "calibrate it anew on labelled rows."
        )
    kept = fitting(policy, before, new, costs)
    walked = walk(policy, new)
    early = walked.visited[:-1]
    if not early:
        return policy
    quotas = Quotas(walked.score[:-1])
    shares = torch.tensor([kept.left[k] for k in walked.visited], dtype=torch.float64) / kept.rows
    spend = Spend(costs, budget or Budget(fraction=1.0), costs.visited(policy.enabled))
    spent, thresholds, on = quotas.tried(spend, shares)
    if budget is not None and not WINDOW * spend.amount <= spent <= spend.limit:
        price = torch.tensor(spend.cumulative, dtype=torch.float64) / spend.cumulative[-1]
        found = quotas.within(spend, lambda tilt: torch.softmax(shares.log() + tilt * price, 0), low=-200.0, high=200.0)
        if found is None:
            raise ValueRangeError(
                f"no shares of the exits that rows left at before spend at most {budget}: the thresholds alone give "
                f"{spent:.4g}. Give a larger budget, or calibrate on labelled rows."
            )
        thresholds, on = found
    # an exit without a quota keeps its head: switched off, it would change what the others score and cost
    never = float(quotas.scores.max()) + 1.0
    full = [at_exit(policy.thresholds, k) for k in range(new.exits)]  # type: ignore[attr-defined]
    for k, threshold, flag in zip(early, thresholds, on, strict=True):
        full[k] = threshold if flag else never
    return dataclasses.replace(policy, thresholds=tuple(full))  # type: ignore[type-var]
