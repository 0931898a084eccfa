"""Commands that choose a policy from a recorded trace: calibrate, compare."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.options import CostsOption, Family, JsonOption, Metric, SeedOption, TraceArgument, check_out, usage
from offramp.cli.show import compared, compared_rows, is_quiet, line, note, percents, result
from offramp.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable

    from offramp.calibrate import Calibration, ErrorRate, MaxDrop
    from offramp.compare import Compared
    from offramp.cost import Budget, CostModel
    from offramp.trace import ExitTrace

__all__ = [
    "INFEASIBLE",
    "Place",
    "budgets_of",
    "calibrate",
    "compare",
    "families_of",
    "place_of",
    "target_of",
    "targets_of",
]

INFEASIBLE = 3


def calibrate(
    trace: TraceArgument,
    policy: Annotated[Family, typer.Option(help="Which family; beem-a and beem-c are BEEM's two weightings.")],
    costs: CostsOption = None,
    out: Annotated[
        Path | None, typer.Option(help="The policy to write, .json; by default RUN/policies/POLICY-TARGET.json.")
    ] = None,
    fraction: Annotated[
        str | None,
        typer.Option(help="Budget: this part of the plain model's cost; several with commas, or FIRST:LAST:STEP."),
    ] = None,
    flops: Annotated[float | None, typer.Option(help="Budget: FLOPs a row.")] = None,
    ms: Annotated[float | None, typer.Option(help="Budget: milliseconds a batch of --batch-size rows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="The size that --ms is meant for.")] = 1,
    error_rate: Annotated[
        bool, typer.Option("--error-rate", help="No budget: rows that leave early err no more than the final exit.")
    ] = False,
    max_drop: Annotated[
        float | None,
        typer.Option(help="No budget: the cheapest that loses at most this on the calibration rows, e.g. 0.01."),
    ] = None,
    metric: Annotated[Metric, typer.Option(help="What --max-drop is of.")] = Metric.accuracy,
    confidence: Annotated[
        float | None, typer.Option(help="For --error-rate: ask it with this confidence, e.g. 0.95.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write the cheapest policy where none meets the budget.")
    ] = False,
    json_out: JsonOption = False,
) -> None:
    """Fit a policy to a budget, an error rate or a largest loss. If none meets it, nothing is written; the code is 3.

    TRACE may be a run that was recorded and measured; its policies are kept in RUN/policies.
    """
    place, targets, outs = _asked(
        trace, costs, out, policy.value, fraction, flops, ms, batch_size, error_rate, confidence, max_drop, metric.value
    )
    rows, prices = place.load()
    missed = 0
    values = []
    for each, path in zip(targets, outs, strict=True):
        found, used = _calibrated(policy.value, rows, prices, each)
        written = found.status != "infeasible" or force
        if written:
            found.save(path)
        values.append(_value(found, rows, used, path if written else None, json_out))
        missed += found.status == "infeasible"
    if json_out:
        result(values[0] if len(values) == 1 else {"policies": values}, (), True)
    if missed:
        note(
            "warning: wrote the cheapest policy all the same."
            if force
            else f"warning: {missed} target(s) cannot be met and were not written; --force writes the cheapest."
        )
        raise typer.Exit(INFEASIBLE)


def _asked(
    trace: Path, costs: Path | None, out: Path | None, family: str, fraction: str | None, flops: float | None,
    ms: float | None, batch_size: int, error_rate: bool, confidence: float | None, max_drop: float | None, metric: str,
) -> "tuple[Place, list[Any], list[Path]]":  # fmt: skip
    """(where the trace is, the targets, a file for each), of the options; anything else is wrong usage."""
    fractions = None if fraction is None else budgets_of(fraction, "--fraction")
    one = fractions[0] if fractions else None
    target = target_of(one, flops, ms, batch_size, error_rate, confidence, max_drop, metric)
    place = place_of(trace, costs)
    if fractions is not None and len(fractions) > 1 and (out is not None or place.run is None):
        raise usage("several budgets are written to a run's policies: give a RUN, and no --out.")
    if out is None and place.run is None:
        raise usage("--out is missing; it is only found for a RUN.")
    from offramp.cost import Budget

    targets = [target] if fractions is None else [Budget(fraction=f) for f in fractions]
    outs = [out or place.policy_path(family, each) for each in targets]
    for path in outs:
        check_out(path)
    return place, targets, outs


def _calibrated(name: str, rows: "ExitTrace", prices: "CostModel", target: Any) -> "tuple[Calibration, CostModel]":
    """(the calibration, the costs that it was made with)."""
    from offramp.compare import calibrate_choice
    from offramp.cost import Budget

    found = calibrate_choice(name, rows, prices, target)
    if isinstance(target, Budget) and target.unit == "ms":
        # the first policy's decisions are timed, then they count in the budget
        from offramp.timing import with_step_times

        prices = with_step_times(prices, found.policy, rows)
        found = calibrate_choice(name, rows, prices, target)
    return found, prices


def compare(
    trace: TraceArgument,
    costs: CostsOption = None,
    test: Annotated[
        Path | None,
        typer.Option(help="A trace to judge on; a run's test trace, or halves of TRACE in turn, --repeats times."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often TRACE is halved, each half tested once.")] = 20,
    policies: Annotated[str, typer.Option(help="all, or names with commas.")] = "all",
    budgets: Annotated[
        str, typer.Option(help="Parts of the plain model's cost: FIRST:LAST:STEP, or numbers with commas.")
    ] = "0.3:0.9:0.1",
    max_drop: Annotated[
        str | None, typer.Option(help="Instead of budgets: largest losses, e.g. 0.005,0.01,0.02.")
    ] = None,
    metric: Annotated[Metric, typer.Option(help="What --max-drop is of, and what is shown beside accuracy.")] = (
        Metric.accuracy
    ),
    seed: SeedOption = 0,
    json_out: JsonOption = False,
) -> None:
    """Compare policies at several budgets, on rows that they were not calibrated on."""
    names = families_of(policies)
    targets = targets_of(budgets, max_drop, metric.value)
    from offramp.compare import compare as run
    from offramp.compare import compare_pooled, halves
    from offramp.trace import ExitTrace

    place = place_of(trace, costs)
    rows, prices = place.load()
    test = test if test is not None else place.test
    jobs = [(target, name) for target in targets for name in names]
    if test is not None:
        judged = ExitTrace.load(test)
        table = _each(jobs, lambda target, name: run(rows, judged, prices, [target], [name], metric=metric.value))
        how = f"calibrated on {rows.rows} rows of {place.trace}, judged on {judged.rows} rows of {test}"
    else:
        pools = halves(rows, repeats, seed=seed)
        table = _each(
            jobs, lambda target, name: compare_pooled(pools, rows.rows, prices, target, [name], metric=metric.value)
        )
        how = f"{repeats} times one half of the {rows.rows} rows calibrates and the other judges, and back"
    if json_out:
        result({"how": how, "rows": compared_rows(table)}, (), True)
    else:
        compared(table, f"Cost as a part of the plain model's; {how}")
        note("status is that of the calibration; cost and accuracy are of the rows that it did not see.")


def _each(jobs: "list[tuple[Any, str]]", call: "Callable[[Any, str], tuple[Compared, ...]]") -> "list[Compared]":
    """The rows of all jobs, with a bar that says how long is left: EENet is fitted anew on every half."""
    from offramp.meter import Meter

    table: list[Compared] = []
    with Meter("comparing", len(jobs), show=not is_quiet()) as meter:
        for target, name in jobs:
            table += call(target, name)
            meter.advance()
    return table


@dataclass(frozen=True)
class Place:
    """Where a trace and its costs are, and the run that they are of, if any. `test` is the run's test trace."""

    trace: Path
    costs: Path
    run: Path | None = None
    test: Path | None = None

    def load(self) -> "tuple[ExitTrace, CostModel]":
        """(the trace, the costs).

        Raises:
            FormatError: a file is damaged.
        """
        from offramp.cost import CostModel
        from offramp.trace import ExitTrace

        return ExitTrace.load(self.trace), CostModel.load(self.costs)

    def policy_path(self, family: str, target: Any) -> Path:
        """Where a run keeps the policy of a family for a target."""
        from offramp.runs import policies_folder

        kind = type(target).__name__
        if kind == "Budget":
            unit = {"fraction": "", "flops": "flops", "ms": f"ms-b{target.batch_size}"}[target.unit]
            name = f"{target.amount:.6g}{unit}"
        else:
            name = f"drop-{target.drop:g}-{target.metric}" if kind == "MaxDrop" else "error-rate"
        return policies_folder(self.run or Path()) / f"{family}-{name}.json"


def place_of(trace: Path, costs: Path | None) -> Place:
    """The trace and the costs that the arguments name: files, or those of a run.

    Raises:
        FormatError: a run has no trace or no costs yet.
    """
    if not trace.is_dir():
        if costs is None:
            raise usage("--costs is missing; it is only found for a RUN.")
        return Place(trace, costs)
    from offramp.runs import costs_path, held_out, trace_path

    fit, test = held_out(trace)
    found = trace_path(trace, fit)
    if not found.is_file():
        raise FormatError(f"{trace} has no trace of its {fit} rows. Record them: offramp record {trace}")
    prices = costs or costs_path(trace)
    if not prices.is_file():
        raise FormatError(f"{trace} has no costs. Measure them: offramp measure {trace}")
    judge = trace_path(trace, test) if test != fit and trace_path(trace, test).is_file() else None
    return Place(found, prices, trace, judge)


def target_of(
    fraction: float | None,
    flops: float | None,
    ms: float | None,
    batch_size: int,
    error_rate: bool,
    confidence: float | None,
    max_drop: float | None,
    metric: str,
) -> "Budget | ErrorRate | MaxDrop":
    """The one target that the options name; anything else is wrong usage."""
    amounts = (("fraction", fraction), ("flops", flops), ("ms", ms), ("max-drop", max_drop))
    given = [f"--{name}" for name, value in amounts if value is not None]
    given += ["--error-rate"] if error_rate else []
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise usage(f"got {got} of --fraction, --flops, --ms, --max-drop and --error-rate; give exactly one.")
    if confidence is not None and not error_rate:
        raise usage("--confidence belongs to --error-rate.")
    if metric != "accuracy" and max_drop is None:
        raise usage("--metric belongs to --max-drop.")
    from offramp.calibrate import ErrorRate, MaxDrop
    from offramp.cost import Budget

    if max_drop is not None:
        return MaxDrop(max_drop, metric)
    if error_rate:
        return ErrorRate(confidence=confidence)
    return Budget(fraction=fraction, flops=flops, ms=ms, batch_size=batch_size)


def targets_of(budgets: str, max_drop: str | None, metric: str) -> list[Any]:
    """The targets of a comparison."""
    from offramp.calibrate import MaxDrop
    from offramp.cost import Budget

    if max_drop is not None:
        return [MaxDrop(drop, metric) for drop in budgets_of(max_drop, "--max-drop")]
    return [Budget(fraction=fraction) for fraction in budgets_of(budgets)]


def families_of(text: str) -> tuple[str, ...]:
    """The names in "max-prob,beem-a"; every family for "all"."""
    known = tuple(f.value for f in Family)
    names = known if text == "all" else tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise usage(f"--policies has {unknown[0]!r}; expected all, or some of {', '.join(known)} with commas.")
    return names


def budgets_of(text: str, option: str = "--budgets") -> tuple[float, ...]:
    """The fractions in "0.3,0.5", or from "0.3:0.9:0.1", where the last counts."""
    try:
        if ":" not in text:
            found = tuple(float(part) for part in text.split(","))
        else:
            first, last, step = (float(part) for part in text.split(":"))
            count = round((last - first) / step - 1e-9) if step > 0 else -1
            found = tuple(round(first + i * step, 9) for i in range(count + 1) if first + i * step <= last + 1e-9)
    except (ValueError, OverflowError):
        found = ()
    if not found or not all(0 < fraction < float("inf") for fraction in found) or len(found) > 1000:
        raise usage(
            f"{option} is {text!r}; expected FIRST:LAST:STEP, e.g. 0.3:0.9:0.1, or numbers above 0 with commas."
        )
    return found


def _value(
    found: "Calibration", rows: "ExitTrace", costs: "CostModel", written: Path | None, json_out: bool
) -> dict[str, Any]:
    """The calibration as JSON; without --json it is told in lines."""
    from offramp.policies import to_dict
    from offramp.simulate import simulate

    shares = simulate(found.policy, rows, costs).shares
    if not json_out:
        line(f"{found.status}: {found.message}")
        line(f"left at each exit: {percents(shares)}, of {found.rows} rows")
        if written is not None:
            line(f"wrote {written}")
    return {
        "status": found.status,
        "message": found.message,
        "achieved": found.achieved,
        "target": str(found.target),
        "rows": found.rows,
        "shares": shares,
        "policy": to_dict(found.policy),
        "out": None if written is None else str(written),
    }
