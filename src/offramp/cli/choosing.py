"""The command that chooses a policy from a recorded trace: calibrate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.options import (
    CertifyOption,
    ConfidenceOption,
    CostsOption,
    DeltaOption,
    DropOption,
    EpsilonOption,
    ErrorRateOption,
    Family,
    FlopsOption,
    FractionOption,
    JsonOption,
    Metric,
    MsOption,
    PreferOption,
    RiskLoss,
    RiskLossOption,
    RiskMethod,
    RiskMethodOption,
    TraceArgument,
    check_out,
    usage,
)
from offramp.cli.show import line, note, percents, result
from offramp.cli.targets import Place, budgets_of, check_risk_options, place_of, risk_of, target_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from offramp.calibrate import Calibration, Target
    from offramp.cost import CostModel
    from offramp.trace import ExitTrace

__all__ = ["INFEASIBLE", "calibrate"]

INFEASIBLE = 3


def calibrate(
    trace: TraceArgument,
    policy: Annotated[Family, typer.Option(help="Which family; beem-a and beem-c are BEEM's two weightings.")],
    costs: CostsOption = None,
    out: Annotated[
        Path | None, typer.Option(help="The policy to write, .json; by default RUN/policies/POLICY-TARGET.json.")
    ] = None,
    fraction: FractionOption = None,
    flops: FlopsOption = None,
    ms: MsOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="The size that --ms is meant for.")] = 1,
    error_rate: ErrorRateOption = False,
    max_drop: DropOption = None,
    metric: Annotated[Metric, typer.Option(help="What --max-drop is of.")] = Metric.accuracy,
    confidence: ConfidenceOption = None,
    risk: EpsilonOption = None,
    delta: DeltaOption = 0.1,
    loss: RiskLossOption = RiskLoss.drop,
    method: RiskMethodOption = RiskMethod.auto,
    certify: CertifyOption = None,
    prefer: PreferOption = None,
    thin: Annotated[
        bool,
        typer.Option("--thin", help="With a budget: do with fewer exits where no fewer calibration rows are right."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write the nearest policy where none meets the target.")
    ] = False,
    json_out: JsonOption = False,
) -> None:
    """Fit a policy to a budget, a risk, an error rate or a largest loss. If none meets it, nothing is written; code 3.

    TRACE may be a run that was recorded and measured; its policies are kept in RUN/policies.
    """
    place, targets, outs = _asked(
        trace, costs, out, policy.value, fraction,
        lambda first: target_of(
            first, flops, ms, batch_size, error_rate, confidence, max_drop, metric.value,
            risk_of(risk, delta, loss.value, method.value), None if prefer is None else prefer.value,
        ),
    )  # fmt: skip
    if certify is not None and risk is None:
        raise usage("--certify belongs to --risk.")
    check_risk_options(risk, delta, loss, method)
    if thin and (risk is not None or not any(each is not None for each in (fraction, flops, ms))):
        raise usage("--thin belongs to a budget: --fraction, --flops or --ms.")
    _write(place, policy.value, list(zip(targets, outs, strict=True)), certify, force, json_out, thin)


def _write(
    place: Place, family: str, wanted: "list[tuple[Any, Path]]", certify: Path | None, force: bool, json_out: bool,
    thin: bool = False,
) -> None:  # fmt: skip
    """Nothing; every target's policy is written and told."""
    rows, prices = place.load()
    kept = None if certify is None else _trace(certify)
    missed = 0
    values = []
    for each, path in wanted:
        found, used = _calibrated(family, rows, prices, each, kept, thin)
        written = found.status != "infeasible" or force
        if written:
            found.save(path)
        values.append(_value(found, rows, used, path if written else None, json_out))
        missed += found.status == "infeasible"
    if json_out:
        result(values[0] if len(values) == 1 else {"policies": values}, (), True)
    if missed:
        note(
            "warning: wrote the nearest policy all the same."
            if force
            else f"warning: {missed} target(s) cannot be met and were not written; --force writes the nearest policy."
        )
        raise typer.Exit(INFEASIBLE)


def _asked(
    trace: Path, costs: Path | None, out: Path | None, family: str, fraction: str | None,
    target_for: "Callable[[float | None], Target]",
) -> "tuple[Place, list[Any], list[Path]]":  # fmt: skip
    """(where the trace is, the targets, a file for each), of the options; anything else is wrong usage."""
    fractions = None if fraction is None else budgets_of(fraction, "--fraction")
    targets = [target_for(each) for each in fractions or (None,)]
    place = place_of(trace, costs)
    if len(targets) > 1 and (out is not None or place.run is None):
        raise usage("several budgets are written to a run's policies: give a RUN, and no --out.")
    if out is None and place.run is None:
        raise usage("--out is missing; it is only found for a RUN.")
    outs = [out or place.policy_path(family, each) for each in targets]
    for path in outs:
        check_out(path)
    return place, targets, outs


def _trace(path: Path) -> "ExitTrace":
    from offramp.trace import ExitTrace

    return ExitTrace.load(path)


def _calibrated(
    name: str, rows: "ExitTrace", prices: "CostModel", target: Any, certify: "ExitTrace | None", thin: bool = False
) -> "tuple[Calibration, CostModel]":
    """(the calibration, the costs that it was made with)."""
    from offramp.choices import calibrate_choice

    budget = getattr(target, "budget", target)
    timed = getattr(budget, "unit", "") == "ms"
    if timed and rows.precision != prices.precision:
        note(
            f"warning: the trace is in {rows.precision} and the costs were measured in {prices.precision}; record and "
            "measure with the same engine and precision."
        )
    found = calibrate_choice(name, rows, prices, target, certify, thin=thin)
    if timed and prices.engine in ("eager", "compiled"):  # a graph of onnxruntime has the step inside
        # the first policy's decisions are timed, then they count in the budget
        from offramp.timing import with_step_times

        prices = with_step_times(prices, found.policy, rows)
        found = calibrate_choice(name, rows, prices, target, certify, thin=thin)
    return found, prices


def _value(
    found: "Calibration", rows: "ExitTrace", costs: "CostModel", written: Path | None, json_out: bool
) -> dict[str, Any]:
    """The calibration as JSON; without --json it is told in lines."""
    import dataclasses

    from offramp.policies import to_dict
    from offramp.simulate import simulate

    shares = simulate(found.policy, rows, costs).shares
    if not json_out:
        line(f"{found.status}: {found.message}")
        line(f"left at each exit: {percents(shares)}, of {rows.rows} rows")
        if written is not None:
            line(f"wrote {written}")
    return {
        "status": found.status,
        "message": found.message,
        "achieved": found.achieved,
        "promise": None if found.promise is None else dataclasses.asdict(found.promise),
        "target": str(found.target),
        "rows": found.rows,
        "shares": shares,
        "policy": to_dict(found.policy),
        "out": None if written is None else str(written),
    }
