"""`offramp check`: whether a calibration still applies to new rows, without labels."""

import dataclasses
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.feeding import items_of
from offramp.cli.opening import Opened, choice_of, choices_of, fit_trace, is_bundle, open_target
from offramp.cli.options import BatchSizeOption, DeviceOption, JsonOption, check_out, read_policy, usage
from offramp.cli.show import is_quiet, line, note, percent, result, table
from offramp.errors import DataError, FormatError

if TYPE_CHECKING:
    from offramp.bundle import Choice
    from offramp.calibrate import Calibration
    from offramp.check import Checked, Reference
    from offramp.cost import Budget, CostModel
    from offramp.policies import Policy
    from offramp.trace import ExitTrace

__all__ = ["SHIFTED", "TOO_FEW", "check"]

SHIFTED, TOO_FEW = 4, 5

PROMISE = "accuracy promises do not carry over to it: those take labelled rows of the new kind, and `offramp calibrate`"


def check(
    target: Annotated[
        Path, typer.Argument(metavar="BUNDLE_OR_RUN", help="A folder of `offramp bundle create` or `offramp train`.")
    ],
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="The new rows: a trace (.safetensors), or what predict reads; - is standard input."
        ),
    ],
    policy: Annotated[
        str | None, typer.Option(help="A policy by name, or a file; the default one unless given.", show_default=False)
    ] = None,
    level: Annotated[
        float, typer.Option(help="The largest chance that rows of the same kind are called shifted.")
    ] = 0.05,
    against: Annotated[
        Path | None, typer.Option(help="The trace of the calibration rows, for a bundle that does not know them.")
    ] = None,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Move the thresholds to the new rows, for cost alone; see --out.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The policy that --recalibrate writes, .json.")] = None,
    encoding: Annotated[str, typer.Option(help="Of text files and lines.")] = "utf-8",
    batch_size: BatchSizeOption = 32,
    device: DeviceOption = "auto",
    json_out: JsonOption = False,
) -> None:
    """Say whether new rows without labels are like those that a policy was calibrated on, and what they cost.

    Exit codes: 0 no shift was seen, 4 the rows have shifted, 5 there are too few rows to say.
    """
    if recalibrate != (out is not None):
        raise usage("--recalibrate and --out go together: the new policy is written there.")
    if not 0 < level <= 0.5:
        raise usage(f"--level is {level}; expected a chance above 0 and at most 0.5, e.g. 0.05.")
    if out is not None:
        check_out(out)
    subject = _subject(target, data, policy, against, device)
    from offramp.check import check as run
    from offramp.trace import ExitTrace

    if subject.opened is None or _is_trace(data):
        new = ExitTrace.load(data)
    else:
        new = _recorded(subject.opened, data, encoding, batch_size)
    budget = subject.budget
    found = run(subject.policy, subject.before, new, subject.costs, level=level, budget=budget)
    value = {"policy": subject.name, "budget": None if budget is None else str(budget), **dataclasses.asdict(found)}
    if not json_out:
        _show(found, subject.name)
    if out is not None:
        moved = _move(subject, new, out, json_out)
        value["recalibrated"] = {"out": str(out), **moved}
    if json_out:
        result(value, (), True)
    if found.verdict != "same":
        raise typer.Exit(SHIFTED if found.verdict == "shifted" else TOO_FEW)


@dataclass(frozen=True)
class _Subject:
    """What is checked; `opened` is None when the model is not needed."""

    name: str
    policy: "Policy"
    calibration: "Calibration | None"
    before: "Reference | ExitTrace"
    costs: "CostModel"
    opened: Opened | None

    @property
    def budget(self) -> "Budget | None":
        """What the policy was calibrated to, if that is a budget."""
        from offramp.cost import Budget

        asked = None if self.calibration is None else self.calibration.target
        asked = getattr(asked, "budget", asked)
        return asked if isinstance(asked, Budget) else None


def _is_trace(data: Path) -> bool:
    return data.suffix == ".safetensors"


def _subject(target: Path, data: Path, policy: str | None, against: Path | None, device: str) -> _Subject:
    """The policy, its costs and its reference, from a bundle or a run.

    Raises:
        FormatError: something of these is missing or damaged.
    """
    from offramp.cost import CostModel
    from offramp.runs import costs_path, read_run
    from offramp.trace import ExitTrace

    if is_bundle(target) or not _is_trace(data):
        opened: Opened | None = open_target(target, None, device)
        costs = opened.bundle.costs  # type: ignore[union-attr]
        known, default = dict(opened.bundle.policies), opened.bundle.default  # type: ignore[union-attr]
    else:  # a trace and a run: the network itself is not wanted
        opened, exits = None, read_run(target)["exits"]
        costs = CostModel.load(costs_path(target)) if costs_path(target).is_file() else None
        known, default = choices_of(target, costs, exits), None
    if costs is None:
        raise FormatError(f"{target} has no costs. Measure them: offramp measure RUN, then make the bundle again.")
    name, choice = _named(target, policy, known, default, costs.exits)
    before = choice.reference if against is None else ExitTrace.load(against)
    if before is None:
        raise FormatError(
            f"{target} does not know what the calibration rows of {name} look like. Give their trace with --against, "
            "or record them (offramp record RUN) and make the bundle again."
        )
    return _Subject(name, choice.policy, choice.calibration, before, costs, opened)


def _named(
    target: Path, policy: str | None, known: "dict[str, Choice]", default: str | None, exits: int
) -> "tuple[str, Choice]":
    """(name, choice) of the policy that is asked for; one that leaves early where none is."""
    if policy is None:
        if not known:
            raise usage(f"{target} has no calibrated policies. See `offramp calibrate`.")
        policy = default if default in known else next(iter(known))
        if len(known) > 1:
            note(f"policy: {policy} (there are {', '.join(known)})")
    if policy in known:
        return policy, known[policy]
    if not Path(policy).is_file():
        raise usage(f"--policy is {policy!r}; expected one of {', '.join(known) or 'none'}, or a file.")
    if not is_bundle(target):
        return Path(policy).stem, choice_of(Path(policy), fit_trace(target, exits))
    from offramp.bundle import Choice

    return Path(policy).stem, Choice(*read_policy(Path(policy)))


def _recorded(opened: Opened, data: Path, encoding: str, batch_size: int) -> "ExitTrace":
    """What every exit says about the rows, which are read as `predict` reads them.

    Raises:
        DataError: there are no rows, or one cannot be used.
    """
    import torch

    from offramp.data import Examples
    from offramp.meter import Meter
    from offramp.record import record
    from offramp.trace import ExitTrace

    bundle, parts = opened.bundle, []
    preprocess = bundle.preprocess
    if preprocess is None:
        raise DataError("it is not known how rows become inputs. Give a trace: offramp record, or record(...).save.")
    items = items_of([], data, preprocess, encoding=encoding)
    with Meter("reading rows", None, show=not is_quiet()) as meter:
        while chunk := list(islice(items, batch_size)):
            for item in chunk:
                bad = item.bad or preprocess.check(item.values)
                if bad is not None:
                    raise DataError(f"{item.where}: {bad.rstrip('.')}. Mend it, or leave the row out.")
            inputs: Any = preprocess.batch([item.values for item in chunk])
            parts.append(record(bundle.model, Examples(inputs), batch_size=len(chunk), progress=False))
            meter.advance()
    if not parts:
        raise DataError(f"{data} has no rows. Give at least one.")
    signals = [part.signals for part in parts if part.signals is not None]
    return ExitTrace(
        torch.cat([part.logits for part in parts], dim=1),
        signals=torch.cat(signals, dim=1) if signals else None,
        signal_names=parts[0].signal_names,
        source=str(data),
    )


def _move(subject: _Subject, new: "ExitTrace", out: Path, json_out: bool) -> dict[str, Any]:
    """What the moved policy does with the new rows, after it was written."""
    from offramp.artefacts import write_json
    from offramp.calibrate import Calibration
    from offramp.check import recalibrate_quantiles
    from offramp.policies import to_dict
    from offramp.simulate import simulate

    budget, costs = subject.budget, subject.costs
    moved = recalibrate_quantiles(subject.policy, subject.before, new, costs, budget)
    shares = simulate(moved, new, costs).shares
    told = f"thresholds moved to {new.rows} rows without labels; {PROMISE}."
    if budget is None:
        spent = costs.spent(shares, _whole_cost(), moved.enabled)
        write_json(out, to_dict(moved))
    else:
        spent = costs.spent(shares, budget, moved.enabled)
        kept = "met" if spent <= budget.amount * (1 + 1e-9) else "best_effort"
        Calibration(moved, budget, spent, kept, told, new.rows).save(out)  # type: ignore[arg-type]
    if not json_out:
        line(f"wrote {out}: {' '.join(map(percent, shares))} leave at each exit, cost {spent:.4g}")
    note(f"warning: {out} has {told}")
    return {"shares": shares, "cost": spent, "message": told}


def _whole_cost() -> "Budget":
    from offramp.cost import Budget

    return Budget(fraction=1.0)


def _show(found: "Checked", name: str) -> None:
    line(f"{name}: {found.verdict}. {found.sentence}")
    rows = (
        (f"left at exit {k}", percent(before), percent(after))
        for k, (before, after) in enumerate(zip(found.shares_before, found.shares_after, strict=True))
    )
    table("", ("", f"{found.reference_rows} calibration rows", f"{found.rows} new rows"), rows)
    table(
        "",
        ("test", "statistic", "p", f"rejected at {100 * found.level:g} % for all"),
        ((t.name, f"{t.statistic:.3f}", f"{t.p:.2g}", "yes" if t.rejected else "no") for t in found.tests),
    )
