"""The command that puts policies side by side: compare."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.options import (
    CertifyOption,
    CostsOption,
    DeltaOption,
    JsonOption,
    Metric,
    RiskLoss,
    RiskLossOption,
    RiskMethod,
    RiskMethodOption,
    SeedOption,
    TraceArgument,
    check_out,
    usage,
)
from offramp.cli.show import compared, compared_rows, is_quiet, line, note, percent, result, table
from offramp.cli.targets import (
    BUDGETS,
    budgets_of,
    families_of,
    known_families,
    place_of,
    targets_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offramp.compare import Compared
    from offramp.cost import CostModel
    from offramp.pools import Pool
    from offramp.trace import ExitTrace

__all__ = ["compare", "value_of"]


def compare(
    trace: TraceArgument,
    costs: CostsOption = None,
    test: Annotated[
        Path | None,
        typer.Option(help="A trace to judge on; a run's test trace, or halves of TRACE in turn, --repeats times."),
    ] = None,
    certify: CertifyOption = None,
    split: Annotated[
        str | None,
        typer.Option(help="Instead of halves in turn: shares of TRACE to fit, certify and test on, e.g. 0.4,0.3,0.3."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often TRACE is halved, each half tested once.")] = 10,
    policies: Annotated[str, typer.Option(help="all, or names with commas.")] = "all",
    budgets: Annotated[
        str | None,
        typer.Option(
            help=f"Parts of the plain model's cost: FIRST:LAST:STEP, or numbers with commas; {BUDGETS} by default."
        ),
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option(help="Largest losses on the fit rows, e.g. 0.005,0.01,0.02; they promise nothing.")
    ] = None,
    risk: Annotated[str | None, typer.Option(help="Promises: what new rows may lose at most, e.g. 0.005,0.01.")] = None,
    delta: DeltaOption = 0.1,
    loss: RiskLossOption = RiskLoss.drop,
    method: RiskMethodOption = RiskMethod.auto,
    metric: Annotated[Metric, typer.Option(help="What --max-drop is of, and what is shown beside accuracy.")] = (
        Metric.accuracy
    ),
    html: Annotated[Path | None, typer.Option(help="A page to write with the frontiers and all figures.")] = None,
    seed: SeedOption = 0,
    json_out: JsonOption = False,
) -> None:
    """Compare policies at several budgets and risks, on rows that they were neither fitted nor certified on."""
    names = families_of(policies)
    targets = targets_of(budgets, max_drop, metric.value, risk, delta, loss.value, method.value)
    if html is not None:
        check_out(html)
    _check_parts(test, certify, split, risk)
    from offramp.compare import compare_pools
    from offramp.meter import Meter
    from offramp.trace import ExitTrace

    place = place_of(trace, costs)
    rows, prices = place.load()
    names = known_families(names, rows) if policies == "all" else names
    judge = test if test is not None else place.test
    pools, count, how = _pools(
        rows, None if judge is None or split is not None else ExitTrace.load(judge),
        None if certify is None else ExitTrace.load(certify), split, repeats, seed, risk is not None,
    )  # fmt: skip
    with Meter("comparing", len(names) * len(pools), show=not is_quiet()) as meter:
        found = compare_pools(pools, count, prices, targets, names, metric=metric.value, progress=meter.advance)
    value = value_of(found, pools, rows if len(pools) > 1 else pools[0].test, prices, how)
    if html is not None:
        from offramp.report.frontier import write_frontier

        write_frontier(value, html)
    _tell(found, value, how, html, json_out)


def _tell(found: "Sequence[Compared]", value: dict[str, Any], how: str, html: Path | None, json_out: bool) -> None:
    """Nothing; the comparison is on standard output."""
    if json_out:
        result(value, (), True)
        return
    compared(found, f"Cost as a part of the plain model's; {how}")
    _summary(value)
    note("status is that of the calibration; cost and accuracy are of the rows that it did not see.")
    if html is not None:
        line(f"wrote {html}")


def _check_parts(test: Path | None, certify: Path | None, split: str | None, risk: str | None) -> None:
    """Nothing, when every part that is given is used; else wrong usage."""
    if certify is not None and risk is None:
        raise usage("--certify belongs to --risk.")
    if split is not None and (test or certify) is not None:
        raise usage("--split takes all parts from TRACE; leave --test and --certify out.")


def _pools(
    rows: "ExitTrace",
    test: "ExitTrace | None",
    certify: "ExitTrace | None",
    split: str | None,
    repeats: int,
    seed: int,
    promises: bool,
) -> "tuple[Sequence[Pool], int, str]":
    """(the pools, how many rows are judged, a line that says what was done)."""
    import torch

    from offramp.pools import Pool, halves, thirds

    if split is not None:
        shares = budgets_of(split, "--split")
        if len(shares) != 3 or sum(shares) > 1 + 1e-9:
            raise usage(f"--split is {split!r}; expected three shares of at most 1 in all, e.g. 0.4,0.3,0.3.")
        pool = thirds(rows, shares, seed=seed)
        kept = 0 if pool.certify is None else pool.certify.rows
        how = f"fitted on {pool.fit.rows}, certified on {kept} and judged on {pool.test.rows} rows, by seed {seed}"
        return [pool], rows.rows, how
    if test is not None:
        fit = rows
        if promises and certify is None:
            fit, certify = rows.split((0.5, 0.5), seed=seed)
        for one in (fit, certify):
            if one is not None:
                one.check_apart(test, "test")
        sure = "" if certify is None else f", certified on {certify.rows}"
        how = f"fitted on {fit.rows} rows{sure}, judged on {test.rows} others"
        return [Pool(fit, test, torch.arange(test.rows), certify)], test.rows, how
    if certify is not None:
        raise usage("--certify needs rows of their own to judge on: give --test as well.")
    pools = halves(rows, repeats, seed=seed, certify=promises)
    how = f"{repeats} times one half of the {rows.rows} rows calibrates and the other judges, and back"
    return pools, rows.rows, how + (" (half of the first certifies)" if promises else "")


def value_of(
    found: "Sequence[Compared]", pools: "Sequence[Pool]", judged: "ExitTrace", costs: "CostModel", how: str
) -> dict[str, Any]:
    """Everything that was found, as JSON. `judged` are all rows that some pool tested."""
    import dataclasses

    from offramp.compare import BASELINE, area, score_quality
    from offramp.quality import exit_quality, overthinking

    families = []
    for name in dict.fromkeys(row.family for row in found):
        mine = [row for row in found if row.family == name and row.budget is not None]
        middle = mine[len(mine) // 2] if mine else next(row for row in found if row.family == name)
        families.append(
            {
                "family": name,
                "area": area(mine),
                "failure_prediction": score_quality(middle.policy, pools[0].test),
                "better": sum((row.difference_low or 0) > 0 for row in mine),
                "worse": sum((row.difference_high or 0) < 0 for row in mine),
                "budgets": len(mine),
            }
        )
    return {
        "how": how,
        "baseline": BASELINE,
        "rows": compared_rows(found),
        "families": families,
        "exits": [
            {**dataclasses.asdict(e), "cost": c} for e, c in zip(exit_quality(judged), costs.cumulative(), strict=True)
        ],
        "overthinking": overthinking(judged),
    }


def _summary(value: dict[str, Any]) -> None:
    """Nothing; the families and the exits are on standard output as two tables."""
    table(
        f"Families over all budgets; better and worse than {value['baseline']} where the 95 % interval says so",
        ("policy", "area under frontier", "failure prediction", "better", "worse", "budgets"),
        (
            (
                row["family"],
                "" if row["area"] is None else percent(row["area"]),
                "" if row["failure_prediction"] is None else f"{row['failure_prediction']:.3f}",
                str(row["better"]),
                str(row["worse"]),
                str(row["budgets"]),
            )
            for row in value["families"]
        ),
    )
    table(
        f"Exits alone; {percent(value['overthinking'])} of rows are right at an early exit and wrong at the end",
        ("exit", "cost", "accuracy", "ECE", "failure prediction", "right here, wrong at the end"),
        (
            (
                str(row["exit"]),
                f"{row['cost']:.3f}",
                percent(row["accuracy"]),
                f"{row['ece']:.3f}",
                "" if row["eefp"] is None else f"{row['eefp']:.3f}",
                percent(row["overthinking"]),
            )
            for row in value["exits"]
        ),
    )
