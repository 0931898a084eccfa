"""Commands that choose a policy from a recorded trace: calibrate, compare."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli.options import CostsOption, Family, JsonOption, SeedOption, TraceArgument, check_out, usage
from offramp.cli.show import compared, compared_rows, note, percents, result

if TYPE_CHECKING:
    from collections.abc import Callable

    from offramp.calibrate import ErrorRate
    from offramp.compare import Compared
    from offramp.cost import Budget

__all__ = ["INFEASIBLE", "budgets_of", "calibrate", "compare", "families_of", "target_of"]

INFEASIBLE = 3


def calibrate(
    trace: TraceArgument,
    costs: CostsOption,
    out: Annotated[Path, typer.Option(help="The policy to write, .json.")],
    policy: Annotated[Family, typer.Option(help="Which family; beem-a and beem-c are BEEM's two weightings.")],
    fraction: Annotated[float | None, typer.Option(help="Budget: this part of the plain model's cost.")] = None,
    flops: Annotated[float | None, typer.Option(help="Budget: FLOPs a row.")] = None,
    ms: Annotated[float | None, typer.Option(help="Budget: milliseconds a batch of --batch-size rows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="The size that --ms is meant for.")] = 1,
    error_rate: Annotated[
        bool, typer.Option("--error-rate", help="No budget: rows that leave early err no more than the final exit.")
    ] = False,
    confidence: Annotated[
        float | None, typer.Option(help="For --error-rate: ask it with this confidence, e.g. 0.95.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write the cheapest policy where none meets the budget.")
    ] = False,
    json_out: JsonOption = False,
) -> None:
    """Fit a policy to a budget or an error rate. If none meets the budget, nothing is written and the code is 3."""
    target = target_of(fraction, flops, ms, batch_size, error_rate, confidence)
    check_out(out)
    from offramp.compare import calibrate_choice
    from offramp.cost import CostModel
    from offramp.simulate import simulate
    from offramp.trace import ExitTrace

    rows, prices = ExitTrace.load(trace), CostModel.load(costs)
    found = calibrate_choice(policy.value, rows, prices, target)
    if ms is not None:  # the first policy's decisions are timed, then they count in the budget
        from offramp.timing import with_step_times

        prices = with_step_times(prices, found.policy, rows)
        found = calibrate_choice(policy.value, rows, prices, target)
    shares = simulate(found.policy, rows, prices).shares
    written = found.status != "infeasible" or force
    if written:
        found.save(out)
    _say(found, shares, out if written else None, json_out)
    if found.status == "infeasible":
        note(
            "wrote the cheapest policy all the same." if force else "nothing was written; --force writes the cheapest."
        )
        raise typer.Exit(INFEASIBLE)


def compare(
    trace: TraceArgument,
    costs: CostsOption,
    test: Annotated[
        Path | None, typer.Option(help="A trace to judge on; without it, halves of TRACE take turns, --repeats times.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often TRACE is halved, each half tested once.")] = 20,
    policies: Annotated[str, typer.Option(help="all, or names with commas.")] = "all",
    budgets: Annotated[
        str, typer.Option(help="Parts of the plain model's cost: FIRST:LAST:STEP, or numbers with commas.")
    ] = "0.3:0.9:0.1",
    seed: SeedOption = 0,
    json_out: JsonOption = False,
) -> None:
    """Compare policies at several budgets, on rows that they were not calibrated on."""
    names, fractions = families_of(policies), budgets_of(budgets)
    from offramp.compare import compare as run
    from offramp.compare import compare_pooled, halves
    from offramp.cost import Budget, CostModel
    from offramp.trace import ExitTrace

    rows, prices = ExitTrace.load(trace), CostModel.load(costs)
    jobs = [(Budget(fraction=fraction), name) for fraction in fractions for name in names]
    if test is not None:
        judged = ExitTrace.load(test)
        table = _each(jobs, lambda target, name: run(rows, judged, prices, [target], [name]))
        how = f"calibrated on {rows.rows} rows of {trace}, judged on {test}"
    else:
        pools = halves(rows, repeats, seed=seed)
        table = _each(jobs, lambda target, name: compare_pooled(pools, rows.rows, prices, target, [name]))
        how = f"{repeats} times one half of the {rows.rows} rows calibrates and the other judges, and back"
    if json_out:
        result({"how": how, "rows": compared_rows(table)}, (), True)
    else:
        compared(table, f"Cost as a part of the plain model's; {how}")
        note("status is that of the calibration; cost and accuracy are of the rows that it did not see.")


def _each(jobs: "list[tuple[Budget, str]]", call: "Callable[[Budget, str], tuple[Compared, ...]]") -> "list[Compared]":
    """The rows of all jobs, with a bar that says how long is left: EENet is fitted anew on every half."""
    from offramp.meter import Meter

    table: list[Compared] = []
    with Meter("comparing", len(jobs), show=True) as meter:
        for target, name in jobs:
            table += call(target, name)
            meter.advance()
    return table


def target_of(
    fraction: float | None,
    flops: float | None,
    ms: float | None,
    batch_size: int,
    error_rate: bool,
    confidence: float | None,
) -> "Budget | ErrorRate":
    """The one target that the options name; anything else is wrong usage."""
    given = [f"--{n}" for n, v in (("fraction", fraction), ("flops", flops), ("ms", ms)) if v is not None]
    given += ["--error-rate"] if error_rate else []
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise usage(f"got {got} of --fraction, --flops, --ms and --error-rate; give exactly one.")
    if confidence is not None and not error_rate:
        raise usage("--confidence belongs to --error-rate.")
    from offramp.calibrate import ErrorRate
    from offramp.cost import Budget

    if error_rate:
        return ErrorRate(confidence=confidence)
    return Budget(fraction=fraction, flops=flops, ms=ms, batch_size=batch_size)


def families_of(text: str) -> tuple[str, ...]:
    """The names in "max-prob,beem-a"; every family for "all"."""
    known = tuple(f.value for f in Family)
    names = known if text == "all" else tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise usage(f"--policies has {unknown[0]!r}; expected all, or some of {', '.join(known)} with commas.")
    return names


def budgets_of(text: str) -> tuple[float, ...]:
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
            f"--budgets is {text!r}; expected FIRST:LAST:STEP, e.g. 0.3:0.9:0.1, or numbers above 0 with commas."
        )
    return found


def _say(found: "Calibration", shares: tuple[float, ...], written: Path | None, json_out: bool) -> None:
    from offramp.policies import to_dict

    value = {
        "status": found.status,
        "message": found.message,
        "achieved": found.achieved,
        "target": str(found.target),
        "rows": found.rows,
        "shares": shares,
        "policy": to_dict(found.policy),
        "out": None if written is None else str(written),
    }
    lines = [f"{found.status}: {found.message}", f"left at each exit: {percents(shares)}, of {found.rows} rows"]
    result(value, lines if written is None else [*lines, f"wrote {written}"], json_out)
