"""What commands are asked for: where a trace is, which families, which targets."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.cli.options import Family, usage
from offramp.cli.show import note
from offramp.errors import FormatError

if TYPE_CHECKING:
    from offramp.calibrate import Risk, Target
    from offramp.cost import Budget, CostModel
    from offramp.trace import ExitTrace

__all__ = [
    "BUDGETS", "Place", "budgets_of", "check_risk_options", "families_of", "known_families", "numbers_of", "place_of",
    "risk_of", "target_of", "targets_of",
]  # fmt: skip

BUDGETS = "0.3:0.9:0.1"


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

        name = {
            "Budget": lambda: _budget_name(target),
            "MaxDrop": lambda: f"drop-{target.drop:g}-{target.metric}",
            "Risk": lambda: _risk_name(target),
            "Joint": lambda: f"{_risk_name(target.risk)}-{target.prefer}-{_budget_name(target.budget)}",
            "ErrorRate": lambda: "error-rate" + (f"-{target.confidence:g}" if target.confidence else ""),
        }[type(target).__name__]()
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


def _budget_name(budget: "Budget") -> str:
    unit = {"fraction": "", "flops": "flops", "ms": f"ms-b{budget.batch_size}"}[budget.unit]
    return f"{budget.amount:.6g}{unit}".replace("+", "")


def _risk_name(risk: "Risk") -> str:
    return f"{risk.loss.replace(' ', '-')}-{risk.epsilon:g}-{risk.delta:g}-{risk.used}"


def target_of(
    fraction: float | None,
    flops: float | None,
    ms: float | None,
    batch_size: int,
    error_rate: bool,
    confidence: float | None,
    max_drop: float | None,
    metric: str,
    risk: "Risk | None" = None,
    prefer: str | None = None,
) -> "Target":
    """The one target that the options name, or a risk and a budget at once; anything else is wrong usage."""
    amounts = (("fraction", fraction), ("flops", flops), ("ms", ms))
    budgets = [f"--{name}" for name, value in amounts if value is not None]
    others = ["--max-drop"] if max_drop is not None else []
    others += ["--error-rate"] if error_rate else []
    if len(budgets) + len(others) + (risk is not None and not budgets) != 1:
        got = " and ".join([*budgets, *others, *(["--risk"] if risk is not None else [])]) or "none"
        raise usage(
            f"got {got} of --fraction, --flops, --ms, --max-drop, --error-rate and --risk; give exactly one, "
            "or a budget and --risk."
        )
    if confidence is not None and not error_rate:
        raise usage("--confidence belongs to --error-rate.")
    if metric != "accuracy" and max_drop is None:
        raise usage("--metric belongs to --max-drop.")
    if prefer is not None and (risk is None or not budgets):
        raise usage("--prefer belongs to a budget together with --risk.")
    from offramp.calibrate import ErrorRate, Joint, MaxDrop
    from offramp.cost import Budget

    if max_drop is not None:
        return MaxDrop(max_drop, metric)
    if error_rate:
        return ErrorRate(confidence=confidence)
    if not budgets:
        return risk  # type: ignore[return-value]
    budget = Budget(fraction=fraction, flops=flops, ms=ms, batch_size=batch_size)
    return budget if risk is None else Joint(risk, budget, prefer or "cheapest")  # type: ignore[arg-type]


def risk_of(epsilon: float | None, delta: float, loss: str, method: str) -> "Risk | None":
    """The risk that the options name, or None."""
    if epsilon is None:
        return None
    from offramp.calibrate import Risk

    return Risk(epsilon, delta, loss, method)  # type: ignore[arg-type]


def check_risk_options(risk: Any, delta: float, loss: str, method: str) -> None:
    """Nothing, when what only a risk has was not asked for without one; else wrong usage."""
    for name, value, usual in (("--delta", delta, 0.1), ("--loss", loss, "drop"), ("--method", method, "auto")):
        if risk is None and value != usual:
            raise usage(f"{name} belongs to --risk.")


def targets_of(
    budgets: str | None, max_drop: str | None, metric: str, risks: str | None = None, delta: float = 0.1,
    loss: str = "drop", method: str = "auto",
) -> list[Any]:  # fmt: skip
    """The targets of a comparison: budgets, largest drops and risks."""
    from offramp.calibrate import MaxDrop
    from offramp.cost import Budget

    check_risk_options(risks, delta, loss, method)
    found: list[Any] = []
    if budgets is not None or (max_drop is None and risks is None):
        found += [Budget(fraction=fraction) for fraction in budgets_of(budgets or BUDGETS)]
    if max_drop is not None:
        found += [MaxDrop(drop, metric) for drop in numbers_of(max_drop, "--max-drop")]
    if risks is not None:
        found += [risk_of(epsilon, delta, loss, method) for epsilon in numbers_of(risks, "--risk")]
    return found


def families_of(text: str) -> tuple[str, ...]:
    """The names in "max-prob,beem-a"; every family for "all"."""
    known = tuple(f.value for f in Family)
    names = known if text == "all" else tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise usage(f"--policies has {unknown[0]!r}; expected all, or some of {', '.join(known)} with commas.")
    return names


def known_families(names: tuple[str, ...], rows: "ExitTrace") -> tuple[str, ...]:
    """The names less those whose signals the trace lacks, which a note tells."""
    from offramp.choices import families_for

    known = families_for(rows)
    if left := [name for name in names if name not in known]:
        note(f"note: {', '.join(left)} left out: the trace has no signals. `offramp certainty RUN` learns them.")
    return tuple(name for name in names if name in known)


def budgets_of(text: str, option: str = "--budgets") -> tuple[float, ...]:
    """The fractions in "0.3,0.5", or from "0.3:0.9:0.1", where the last counts; all above 0."""
    found = numbers_of(text, option)
    if not all(found):
        raise usage(f"{option} is {text!r}; expected numbers above 0.")
    return found


def numbers_of(text: str, option: str) -> tuple[float, ...]:
    """The numbers in "0,0.01", or from "0:0.05:0.01", where the last counts."""
    try:
        if ":" not in text:
            found = tuple(float(part) for part in text.split(","))
        else:
            first, last, step = (float(part) for part in text.split(":"))
            count = round((last - first) / step - 1e-9) if step > 0 else -1
            found = tuple(round(first + i * step, 9) for i in range(count + 1) if first + i * step <= last + 1e-9)
    except (ValueError, OverflowError):
        found = ()
    if not found or not all(0 <= number < float("inf") for number in found) or len(found) > 1000:
        raise usage(
            f"{option} is {text!r}; expected numbers with commas, none below 0, or FIRST:LAST:STEP, e.g. 0.3:0.9:0.1."
        )
    return found
