"""From a recorded trace and a target to a policy: `calibrate(family, trace, costs, target)`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from offramp.calibrate.eenet import EENetFit, blank_eenet, fit_eenet
from offramp.calibrate.error_rate import ErrorRate, fit_error_rate
from offramp.calibrate.max_drop import MaxDrop, cheapest_within
from offramp.calibrate.quotas import quota_thresholds
from offramp.calibrate.result import Calibration, Status
from offramp.calibrate.spend import WINDOW, Spend
from offramp.calibrate.thresholds import fit_thresholds
from offramp.cost import Budget, CostModel
from offramp.errors import ShapeError, ValueRangeError
from offramp.policies import BEEM, EENet, Entropy, MaxProb, Patience, Policy
from offramp.policies.base import as_flags, as_floats
from offramp.simulate import simulate, walk
from offramp.trace import ExitTrace

__all__ = ["Calibration", "EENetFit", "ErrorRate", "MaxDrop", "beem_weights", "calibrate", "quota_thresholds"]

#: Every score is at least this, so that a threshold of ALWAYS lets every row leave.
ALWAYS = -1e6

Weights = Literal["accuracy", "cost"] | Sequence[float | int]


def calibrate(
    family: type,
    trace: ExitTrace,
    costs: CostModel,
    target: Budget | ErrorRate | MaxDrop,
    *,
    weights: Weights = "accuracy",
    reset: Literal["own", "zero"] = "own",
    fit: EENetFit | None = None,
    enabled: Sequence[bool] | None = None,
) -> Calibration:
    """The policy of a family that meets a target on a trace.

    A budget is met from below: the mean cost is the largest the family reaches that is not above it. It is a statement
    about the rows of the trace; rows of another kind may spend more.

    Example:
        >>> trace = ExitTrace(logits=torch.randn(3, 200, 4), labels=torch.randint(4, (200,)))
        >>> calibrate(MaxProb, trace, CostModel.from_costs((0.2, 0.6, 1.0)), Budget(fraction=0.5)).status
        'met'

    Args:
        family: MaxProb, Entropy, Patience, BEEM or EENet.
        trace: rows that training has not seen. BEEM-A, EENet, MaxDrop and ErrorRate need labels.
        costs: of the same model.
        target: what a row may cost; or how much of a metric may be lost (MaxDrop: the cheapest such policy); or, for
            MaxProb, Entropy and BEEM, how often leaving rows may err (ErrorRate).
        weights: BEEM's: "accuracy" (BEEM-A), "cost" (BEEM-C), or one number per exit.
        reset: BEEM's, see there.
        fit: EENet's settings.
        enabled: exits that may be used; None means all. The last is always used, whatever its flag.

    Raises:
        ShapeError: trace, costs and flags are for different numbers of exits.
        ValueRangeError: the family is unknown, or cannot be calibrated to this target.
    """
    _check_kinds(trace, costs, target)
    if costs.exits != trace.exits:
        raise ShapeError(f"the cost model has {costs.exits} exits and the trace {trace.exits}. Measure the same model.")
    flags = (True,) * trace.exits if enabled is None else costs.visited(as_flags(enabled))
    start = _start(family, trace, weights, reset, flags)
    if isinstance(target, ErrorRate):
        return _to_error_rate(start, trace, costs, target)
    off = _start(family, trace, weights, reset, _only_last(trace.exits))
    if isinstance(target, MaxDrop):
        return _to_drop(
            lambda budget: _to_budget(start, off, trace, costs, budget, fit, flags), off, trace, costs, target, flags
        )
    return _to_budget(start, off, trace, costs, target, fit, flags)


def beem_weights(trace: ExitTrace, weights: Weights) -> tuple[float, ...]:
    """BEEM's expert weights: "accuracy" is each exit's accuracy on the trace (BEEM-A), "cost" is 0.1 (k + 1) (BEEM-C).

    Source: Bajpai and Hanawal 2025, section 3; figure 1 shows 0.1 to 1.2 over 12 layers.
    """
    if weights == "accuracy":
        return trace.accuracy()
    if weights == "cost":
        return tuple(round(0.1 * (k + 1), 12) for k in range(trace.exits))
    if isinstance(weights, str):
        raise ValueRangeError(f"weights is {weights!r}; expected 'accuracy', 'cost' or one number per exit.")
    found = as_floats(weights, "weights")
    if not isinstance(found, tuple):
        raise ValueRangeError(f"weights is {weights!r}; expected 'accuracy', 'cost' or one number per exit.")
    return found


def _check_kinds(trace: Any, costs: Any, target: Any) -> None:
    for what, value, kinds in (("trace", trace, ExitTrace), ("costs", costs, CostModel)):
        if not isinstance(value, kinds):
            raise ShapeError(f"{what} is {type(value).__name__}; expected {kinds.__name__}.")
    if not isinstance(target, Budget | ErrorRate | MaxDrop):
        raise ValueRangeError(f"the target is {target!r}; expected Budget(fraction=0.5), MaxDrop(0.01) or ErrorRate().")


def _start(family: type, trace: ExitTrace, weights: Weights, reset: Any, flags: tuple[bool, ...]) -> Policy:
    """A policy of the family that lets every row leave at once."""
    always = (ALWAYS,) * trace.exits
    if family is BEEM:
        return BEEM(weights=beem_weights(trace, weights), thresholds=always, reset=reset, enabled=_plain_flags(flags))
    if family in (MaxProb, Entropy):
        return family(thresholds=always, enabled=_plain_flags(flags))
    if family is Patience:
        return Patience(patience=0, enabled=_plain_flags(flags))
    if family is EENet:
        return blank_eenet(trace.exits, trace.classes, flags)
    raise ValueRangeError(f"{family!r} cannot be calibrated; expected MaxProb, Entropy, Patience, BEEM or EENet.")


def _fit_shared(start: Any, trace: ExitTrace, spend: Spend) -> Policy:
    walked = walk(start, trace)
    fitted = fit_thresholds(walked.score[:-1], spend) if len(walked.visited) > 1 else None
    if fitted is None:
        return start
    full = [fitted.thresholds[-1]] * trace.exits
    for k, threshold in zip(walked.visited, fitted.thresholds, strict=False):
        full[k] = threshold
    return replace(start, thresholds=tuple(full))


def _fit_patience(trace: ExitTrace, spend: Spend) -> Patience:
    """The largest patience whose mean cost is within the budget. Cost rises with patience."""
    best = Patience(0, _plain_flags(spend.enabled))
    for patience in range(len(spend.visited)):
        policy = Patience(patience, _plain_flags(spend.enabled))
        shares = simulate(policy, trace, spend.costs).shares
        if spend.costs.spent(shares, spend.budget, spend.enabled) > spend.limit:
            break
        best = policy
    return best


def _to_budget(
    start: Policy, off: Policy, trace: ExitTrace, costs: CostModel, target: Budget, fit: EENetFit | None,
    flags: tuple[bool, ...],
) -> Calibration:  # fmt: skip
    """The policy of `start`'s family that spends most of a budget; `off` runs every row to the end."""
    cheapest = min(Spend(costs, target, flags).cumulative)
    if target.amount < cheapest * (1 - 1e-9):
        return _infeasible(start, trace, costs, target, cheapest, flags)
    if target.amount >= costs.spent([0.0] * (trace.exits - 1) + [1.0], target, _only_last(trace.exits)):
        return _result(off, trace, costs, target)
    if isinstance(start, EENet):
        policy: Any = fit_eenet(trace, lambda on: Spend(costs, target, on), fit or EENetFit(), flags)
    elif isinstance(start, Patience):
        policy = _fit_patience(trace, Spend(costs, target, flags))
    else:
        policy = _fit_shared(start, trace, Spend(costs, target, flags))
    return _result(policy, trace, costs, target)


def _to_error_rate(start: Any, trace: ExitTrace, costs: CostModel, target: ErrorRate) -> Calibration:
    if not isinstance(start, MaxProb | Entropy | BEEM):
        raise ValueRangeError(f"{type(start).__name__} has no threshold to set from error rates. Give it a Budget.")
    policy = fit_error_rate(start, trace, target)
    outcome = simulate(policy, trace, costs)
    final = trace.accuracy()[-1]
    none = not any(outcome.shares[:-1])
    message = (
        "no exit errs as rarely as the final one, so every row runs to the end."
        if none
        else f"rows leave at {outcome.cost:.3f} of the plain model's cost with accuracy {outcome.accuracy:.4f}; "
        f"the final exit alone has {final:.4f}."
    )
    return Calibration(policy, target, outcome.cost, "best_effort" if none else "met", message, trace.rows)


def _to_drop(
    to_budget: Any, off: Policy, trace: ExitTrace, costs: CostModel, target: MaxDrop, flags: tuple[bool, ...]
) -> Calibration:
    least, most = min(costs.cumulative(flags)), costs.cumulative(_only_last(trace.exits))[-1]
    found = cheapest_within(to_budget, trace, costs, target, least, most) if least < most else None
    if found is None:
        message = f"no cheaper policy of the family keeps {target} on these rows, so every row runs to the end."
        return Calibration(off, target, most, "best_effort", message, trace.rows)
    policy, cost, value, plain = found
    message = (
        f"{type(policy).__name__} spends {cost:.3f} of the plain model's cost with {target.metric} {value:.4f} "
        f"against {plain:.4f}, on these {trace.rows} rows; on others it may lose more."
    )
    return Calibration(policy, target, cost, "met", message, trace.rows)


def _infeasible(
    start: Policy, trace: ExitTrace, costs: CostModel, target: Budget, cheapest: float, flags: tuple[bool, ...]
) -> Calibration:
    amount: dict[str, Any] = {target.unit: cheapest}
    least = str(replace(target, **amount))
    message = (
        f"a budget of {target} is below the cheapest exit: leaving at once costs {least}. "
        "Ask for at least that, attach an earlier exit, or use cheaper heads. "
        "The policy given lets every row leave at once."
    )
    achieved = costs.spent(simulate(start, trace, costs).shares, target, _plain_flags(flags))
    return Calibration(start, target, achieved, "infeasible", message, trace.rows)


def _result(policy: Policy, trace: ExitTrace, costs: CostModel, target: Budget) -> Calibration:
    achieved = costs.spent(simulate(policy, trace, costs).shares, target, policy.enabled)
    name, plain = type(policy).__name__, costs.plain(target)
    used = achieved / target.amount
    status: Status
    if used > 1 + 1e-9:
        status, message = "infeasible", f"{name} spends {achieved:.4g}, above the budget of {target}."
    elif used >= WINDOW - 1e-9:
        status, message = "met", f"{name} spends {achieved:.4g} of a budget of {target}."
    elif target.amount >= plain:
        status = "met"
        message = f"a budget of {target} covers the whole model ({plain:.4g}), so no row needs to leave early."
    else:
        status = "best_effort"
        message = (
            f"{name} spends {achieved:.4g} of a budget of {target}: its next step up costs more than the budget "
            "(patience comes in whole steps, and rows with tied scores leave together)."
        )
    return Calibration(policy, target, achieved, status, message, trace.rows)


def _only_last(exits: int) -> tuple[bool, ...]:
    return (False,) * (exits - 1) + (True,)


def _plain_flags(flags: tuple[bool, ...]) -> tuple[bool, ...] | None:
    """None when every exit is on: the simpler value prints shorter."""
    return None if all(flags) else flags
