"""One verdict about new rows, and what they cost."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from offramp.calibrate.bounds import betting_p
from offramp.check.kept import LEARNED, Reference, fitting, left_at, observed
from offramp.check.twosample import Test, band_distance, holm, ks_p, shares_test, visible_distance
from offramp.cost import Budget, CostModel
from offramp.errors import ValueRangeError
from offramp.policies import Policy
from offramp.policies.base import visits
from offramp.simulate import Walk, walk
from offramp.trace import ExitTrace

__all__ = ["Checked", "Verdict", "check", "compared"]

LEAST_DRAWS, MOST_DRAWS = 1_999, 200_000  # permutations of the exit shares
STEPS = 16  # of the search for the ends of an interval
THIRD = 1 / 3  # rows are too few when a shift of a third of them would not show

Verdict = Literal["same", "shifted", "too few rows"]


@dataclass(frozen=True)
class Checked:
    """Whether rows are of the kind that a policy was calibrated on, and what they cost.

    Args:
        verdict: "shifted" when a test rejects; "too few rows" when a shift of a third of the rows would not show;
            else "same", which means that no shift was seen.
        sentence: the same for a person, with the level.
        rows, reference_rows: how many were compared.
        level: the largest chance that rows of the same kind are called shifted.
        visible: the smallest distance between the samples that a KS test surely rejects, as a share of the rows.
        tests: one by one.
        shares_before, shares_after: of rows that left at each exit.
        cost_before, cost_after: the mean cost of a row in `unit` (of the budget; "fraction" without one).
        cost_low, cost_high: an interval of `cost_after` that is right with a chance of 1 - level, at any number of
            rows; for milliseconds approximately.
        cost_holds: False when the budget is exceeded beyond chance (one-sided, at the same level but a test of its
            own); None without a budget.
    """

    verdict: Verdict
    sentence: str
    rows: int
    reference_rows: int
    level: float
    visible: float
    tests: tuple[Test, ...]
    shares_before: tuple[float, ...]
    shares_after: tuple[float, ...]
    unit: str
    cost_before: float
    cost_after: float
    cost_low: float
    cost_high: float
    cost_holds: bool | None


def check(
    policy: Policy,
    before: Reference | ExitTrace,
    new: ExitTrace,
    costs: CostModel,
    *,
    level: float = 0.05,
    budget: Budget | None = None,
    seed: int = 0,
) -> Checked:
    """Whether new rows, without labels, look to a policy like those that it was calibrated on.

    A permutation test of the exit shares and a two-sample Kolmogorov-Smirnov test of every sample of the reference are
    joined by Holm's procedure. The KS tests keep their level at any number of rows and with ties. Thresholds that were
    fitted to the reference rows leave the shares' test its level to a good approximation; of scorers that were learned
    from them (EENet, ZTW, JEI-DNN, accuracy bins, Stopping) neither shares nor scores are tested, only max-prob.

    Args:
        before: of the calibration rows, for this policy.
        new: what every exit says about the new rows; labels are not looked at.
        costs: of the same model.
        level: the largest chance of a false alarm.
        budget: what the policy was calibrated to.
        seed: of the permutations.

    Raises:
        ShapeError: exits or classes differ.
        ValueRangeError: the reference is another policy's, the level is none, or the budget's unit was not measured.
    """
    if isinstance(level, bool) or not 0 < level <= 0.5:
        raise ValueRangeError(f"level is {level!r}; expected a chance above 0 and at most 0.5, e.g. 0.05.")
    kept = fitting(policy, before, new, costs)
    walked = walk(policy, new)
    left = left_at(walked, new.exits)
    tests = compared(policy, kept, new, walked, level, seed)
    visible = min(1.0, visible_distance(kept.rows, new.rows, len(tests), level) + kept.coarse)
    cost = _cost(policy, kept, left, costs, level, budget, seed)
    verdict: Verdict = "shifted" if any(t.rejected for t in tests) else "same" if visible <= THIRD else "too few rows"
    told = _sentence(verdict, new.rows, kept.rows, level, visible, tests)
    shares = tuple(count / new.rows for count in left)
    return Checked(
        verdict, f"{told} {_cost_sentence(cost, budget)}", new.rows, kept.rows, level, visible, tests, kept.shares,
        shares, *cost,
    )  # fmt: skip


def compared(
    policy: Policy, kept: Reference, new: ExitTrace, walked: Walk, level: float, seed: int = 0
) -> tuple[Test, ...]:
    """The tests of the new rows, which reject by Holm's procedure; `walked` is the policy's walk over them."""
    found = []
    if not isinstance(policy, LEARNED) and len(walked.visited) > 1:
        draws = min(MOST_DRAWS, max(LEAST_DRAWS, math.ceil(100 / level)))  # enough for a p-value of level / 100
        found.append(("exit shares", *shares_test(kept.left, left_at(walked, new.exits), draws, seed)))
    samples = {(sample.of, sample.exit): np.asarray(sample.points, np.float32) for sample in kept.samples}
    for of, k, values in observed(policy, new, walked):
        apart = band_distance(samples[of, k], kept.ranks, kept.rows, values)
        found.append((f"{of} at exit {k}", apart / (kept.rows * new.rows), ks_p(apart, kept.rows, new.rows)))
    return holm(found, level)


def _cost(
    policy: Policy, kept: Reference, left: tuple[int, ...], costs: CostModel, level: float, budget: Budget | None,
    seed: int,
) -> tuple[str, float, float, float, float, bool | None]:  # fmt: skip
    """(unit, cost before, after, low, high, whether the budget holds)."""
    asked, rows = budget or Budget(fraction=1.0), sum(left)
    shares = torch.tensor(left, dtype=torch.float64) / rows

    def spent(of: Tensor) -> float:
        return costs.spent(of.tolist(), asked, policy.enabled)

    after = spent(shares)
    # what one more row at exit k adds: its cost where that is a sum over rows, the slope where batches are regrouped
    step = 1.0 if asked.unit != "ms" else 1e-4
    exits = visits(policy, len(left))
    one = torch.eye(len(left), dtype=torch.float64)
    value = {k: after + (spent((1 - step) * shares + step * one[k]) - after) / step for k in exits}
    least, most = min(value.values()), max(value.values())
    before = costs.spent(kept.shares, asked, policy.enabled)
    if most - least <= 1e-12 * abs(most):
        return asked.unit, before, after, after, after, None if budget is None else after <= asked.amount * (1 + 1e-9)
    unit = torch.tensor([(value.get(k, least) - least) / (most - least) for k in range(len(left))], dtype=torch.float64)
    # the bounds bet on row after row, so their order must not tell anything
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    spends = unit.repeat_interleave(torch.tensor(left))[order]
    low, high = (least + (most - least) * bound for bound in _interval(spends, level))
    amount = (asked.amount * (1 + 1e-9) - least) / (most - least)
    holds = None if budget is None else float(betting_p(1 - spends, 1 - amount, level)) > level
    return asked.unit, before, after, min(low, after), max(high, after), holds


def _interval(spends: Float[Tensor, "row"], level: float) -> tuple[float, float]:
    """Bounds in [0, 1] of the mean that holds with a chance of 1 - level."""

    def above(losses: Float[Tensor, "row"]) -> float:
        ruled_out, not_yet = 1.0, 0.0
        for _ in range(STEPS):
            middle = (ruled_out + not_yet) / 2
            if float(betting_p(losses, middle, level / 2)) <= level / 2:
                ruled_out = middle
            else:
                not_yet = middle
        return ruled_out

    return 1 - above(1 - spends), above(spends)


def _sentence(verdict: str, rows: int, before: int, level: float, visible: float, tests: tuple[Test, ...]) -> str:
    sure = f"at most {100 * level:g} % of checks of unshifted rows say so"
    if verdict == "shifted":
        worst = min((t for t in tests if t.rejected), key=lambda t: (t.p, -t.statistic))
        return (
            f"These {rows} rows are of another kind than the {before} that the policy was calibrated on ({sure}): "
            f"{sum(t.rejected for t in tests)} of {len(tests)} tests reject, first {worst.name} (p = {worst.p:.2g})."
        )
    if verdict == "too few rows":
        return (
            f"{rows} new rows against {before} are too few to say: not even a shift of a third of the rows would show "
            f"at a level of {100 * level:g} %. Give more rows."
        )
    return (
        f"No shift was seen in {rows} rows against {before}: none of {len(tests)} tests rejects at a level of "
        f"{100 * level:g} % for all together. A shift of less than {100 * visible:.0f} % of the rows may go unseen."
    )


def _cost_sentence(cost: tuple[str, float, float, float, float, bool | None], budget: Budget | None) -> str:
    unit, before, after, low, high, holds = cost
    name = {"fraction": "of the plain model", "flops": "FLOPs a row", "ms": "ms a batch"}[unit]
    said = f"A row costs {after:.4g} ({low:.4g} to {high:.4g}) {name}; it was {before:.4g}."
    if holds is None:
        return said
    return f"{said} The budget of {budget} is {'not seen to be exceeded' if holds else 'exceeded'}."
