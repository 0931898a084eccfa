"""From a recorded trace and a target to a policy: `calibrate(family, trace, costs, target)`."""

from collections.abc import Sequence
from typing import Literal

from offramp.calibrate.calibrator import Calibrator, Target
from offramp.calibrate.eenet import EENetFit
from offramp.calibrate.error_rate import ErrorRate
from offramp.calibrate.families import Options, Weights, beem_weights
from offramp.calibrate.max_drop import MaxDrop
from offramp.calibrate.profit import profitable, thinned
from offramp.calibrate.quotas import quota_thresholds
from offramp.calibrate.result import Calibration
from offramp.calibrate.risk import Joint, Promise, Risk
from offramp.cost import Budget, CostModel
from offramp.errors import ValueRangeError
from offramp.policies import ZTW, EENet, Fixed, Policy
from offramp.trace import ExitTrace

__all__ = [
    "Calibration", "Calibrator", "EENetFit", "ErrorRate", "Joint", "MaxDrop", "Options", "Promise", "Risk", "Target",
    "beem_weights", "calibrate", "calibrate_with", "quota_thresholds",
]  # fmt: skip


def calibrate(
    family: type | Policy,
    trace: ExitTrace,
    costs: CostModel,
    target: Target,
    *,
    certify: ExitTrace | None = None,
    weights: Weights = "accuracy",
    reset: Literal["own", "zero"] = "own",
    fit: EENetFit | None = None,
    enabled: Sequence[bool] | None = None,
    thin: bool = False,
) -> Calibration:
    """The policy of a family that meets a target on a trace.

    A budget is met from below: the mean cost is the largest the family reaches that is not above it. It is a statement
    about the rows of the trace; rows of another kind may spend more. A risk is a statement about new rows.

    For a budget in milliseconds, exits whose price in measured time is more than they save are switched off, and where
    the plain model is faster than any policy of the family the result is the plain model, with a sentence that says so.

    Example:
        >>> trace = ExitTrace(logits=torch.randn(3, 200, 4), labels=torch.randint(4, (200,)))
        >>> calibrate(MaxProb, trace, CostModel.from_costs((0.2, 0.6, 1.0)), Budget(fraction=0.5)).status
        'met'

    Args:
        family: a class of `offramp.policies`, or a value of one: its thresholds are set, its other fields are kept.
        trace: rows that training has not seen. What is learned from right and wrong answers needs labels.
        costs: of the same model.
        target: what a row may cost (Budget); what new rows may lose (Risk), or both (Joint); how much of a metric may
            be lost on these rows (MaxDrop: the cheapest such policy); or, for MaxProb, Entropy, Margin and BEEM, how
            often leaving rows may err (ErrorRate).
        certify: for Risk and Joint: rows that nothing was fitted on, neither network nor policy. None takes a seeded
            half of `trace`, and fits on the other.
        weights: BEEM's: "accuracy" (BEEM-A), "cost" (BEEM-C), or one number per exit.
        reset: BEEM's, see there.
        fit: EENet's settings.
        enabled: exits that may be used; None means all. The last is always used, whatever its flag.
        thin: for a budget: try to do with fewer exits, as long as the rows of the trace are answered no worse.

    Raises:
        ShapeError: trace, costs and flags are for different numbers of exits.
        ValueRangeError: the family is unknown, or cannot be calibrated to this target, or not on tokens.
        DataError: labels are needed and missing.
    """
    return calibrate_with(
        family, trace, costs, target, Options(weights, reset, fit), certify=certify, enabled=enabled, thin=thin
    )


def calibrate_with(
    family: type | Policy,
    trace: ExitTrace,
    costs: CostModel,
    target: Target,
    options: Options,
    *,
    certify: ExitTrace | None = None,
    enabled: Sequence[bool] | None = None,
    thin: bool = False,
) -> Calibration:
    """`calibrate` with the settings of families in one value."""
    if isinstance(trace, ExitTrace) and trace.of_tokens:
        _check_tokens(family, target)
    if isinstance(target, Risk | Joint) and certify is None and isinstance(trace, ExitTrace):
        trace, certify = trace.split((0.5, 0.5))
    first = Calibrator(family, trace, costs, options, enabled=enabled)
    fixed = family is Fixed or isinstance(family, Fixed)
    chosen = enabled is not None or (not isinstance(family, type) and getattr(family, "enabled", None) is not None)
    if not isinstance(target, Budget) or fixed or chosen:
        return first.to(target, certify)

    def make(flags: tuple[bool, ...]) -> Calibrator:
        return first if all(flags) else Calibrator(family, trace, costs, options, enabled=flags)

    found = profitable(make, trace, costs, target) if target.unit == "ms" else first.to(target)
    return thinned(make, trace, target, found) if thin else found


def _check_tokens(family: type | Policy, target: Target) -> None:
    """Nothing, where family and target make sense for rows that are tokens of texts."""
    kind = family if isinstance(family, type) else type(family)
    if kind in (EENet, ZTW):
        raise ValueRangeError(
            f"{kind.__name__} knows classes by their number, and a trace of tokens has other words in each row; take "
            "max-prob, margin, patience, BEEM or Stopping."
        )
    if isinstance(target, Risk | Joint):
        raise ValueRangeError(
            "the rows are tokens, and those of one text depend on each other, so that a risk promises nothing; promise "
            "over whole texts with offramp.generation.certify_texts."
        )
