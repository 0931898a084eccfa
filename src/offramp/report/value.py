"""The report as a value of plain numbers and words, which JSON holds."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from offramp.artefacts import read_json, write_json
from offramp.errors import FormatError

__all__ = ["Example", "ExitFacts", "Measured", "Part", "Point", "Report", "Shown"]

KIND, VERSION = "offramp.report", 1


@dataclass(frozen=True)
class ExitFacts:
    """One exit alone: where it is, what a row costs up to it with its head, and how good and how well calibrated it is.

    Args:
        exit: from 0.
        tap: the module that it is behind.
        cost: of a row that leaves here, as a part of the plain model's.
        accuracy, low, high: with a 95 % interval.
        ece: expected calibration error, 15 bins.
        confidence, right, count: of each filled bin: mean confidence, share of right answers, rows.
    """

    exit: int
    tap: str
    cost: float
    accuracy: float
    low: float
    high: float
    ece: float
    confidence: tuple[float, ...]
    right: tuple[float, ...]
    count: tuple[int, ...]


@dataclass(frozen=True)
class Point:
    """A policy of a family at one target, on rows it was not calibrated on; see `offramp.compare.Compared`."""

    family: str
    target: str
    status: str
    cost: float
    value: float
    low: float
    high: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """A live run at one batch size against the plain model, in milliseconds a batch; see `offramp.timing.Speed`."""

    batch_size: int
    plain_ms: float
    policy_ms: float
    spread_ms: float
    speedup: float
    promise: float | None
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Shown:
    """A policy that the report is about: what was asked, what it does on the test rows, and how fast it ran.

    Args:
        name: for readers.
        family: its family.
        message: of its calibration.
        fitted_rows: how many rows it was calibrated on.
        cost: mean, counted in FLOPs, as a part of the plain model's.
        value, low, high: the metric on the test rows, with a 95 % interval.
        shares: of test rows that left at each exit.
        live: measured runs.
    """

    name: str
    family: str
    message: str
    fitted_rows: int
    cost: float
    value: float
    low: float
    high: float
    shares: tuple[float, ...]
    live: tuple[Measured, ...] = ()


@dataclass(frozen=True)
class Example:
    """A test row: where it left, what was said and what was right; a text, or an image as a data URI."""

    exit: int
    said: str
    truth: str
    probability: float
    text: str = ""
    image: str = ""


@dataclass(frozen=True)
class Part:
    """Rows that were used for something."""

    what: str
    rows: int
    source: str


@dataclass(frozen=True)
class Report:
    """All that a report says.

    Args:
        title: for readers.
        labels: names of the classes.
        metric: what `value` and `plain` are: one of `offramp.metrics.METRICS`.
        plain: the metric of the model without exits on the test rows, with its interval.
        exits: each exit alone.
        curve: policies of every family over budgets.
        policies: what the report is about.
        unused: live runs where every exit is visited and none taken.
        classes: (rows, recall, precision, F1) of the plain model for each class.
        examples: rows that left early and late.
        parts: which rows were used for what.
        machine: where it was timed, or "".
        versions: of packages.
        notes: what a reader must know.
        command: how it was made.
    """

    title: str
    labels: tuple[str, ...]
    metric: str
    plain: tuple[float, float, float]
    exits: tuple[ExitFacts, ...]
    curve: tuple[Point, ...]
    policies: tuple[Shown, ...]
    unused: tuple[Measured, ...] = ()
    classes: tuple[tuple[int, float, float, float], ...] = ()
    examples: tuple[Example, ...] = ()
    parts: tuple[Part, ...] = ()
    machine: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    command: str = ""

    def best(self) -> tuple[Shown, Measured] | None:
        """The fastest measured run of a policy that is not worse than the plain model beyond chance, or None."""
        good = [policy for policy in self.policies if policy.high >= self.plain[0]]
        runs = [(policy, live) for policy in good for live in policy.live]
        return max(runs, key=lambda run: run[1].speedup, default=None)

    def headline(self) -> str:
        """The answer in one sentence."""
        best = self.best()
        if best is not None and best[1].speedup > 1.0:
            policy, live = best
            return f"{live.speedup:.1f} times faster {_against(policy.value, self.plain[0])}"
        if best is not None:
            return "Exits do not pay here: no policy ran faster than the plain model"
        good = [policy for policy in self.policies if policy.high >= self.plain[0]]
        if any(policy.live for policy in self.policies):
            return "Exits do not pay here: every policy loses more than chance explains"
        if not good:
            return "No policy keeps the plain model's answers at this budget"
        cheapest = min(good, key=lambda policy: policy.cost)
        return f"{100 * cheapest.cost:.0f} % of the cost {_against(cheapest.value, self.plain[0])} (counted, not timed)"

    def detail(self) -> str:
        """The sentence below it: which policy, where, and how sure."""
        best = self.best()
        name = self.metric.replace("-", " ")
        if best is None:
            return f"The plain model's {name} is {_pc(self.plain[0])} ({_pc(self.plain[1])} to {_pc(self.plain[2])})."
        policy, live = best
        promise = "" if live.promise is None else f" of a promised {live.promise:.2f}"
        return (
            f"{policy.name} at batch {live.batch_size}: {live.policy_ms:.2f} ms against {live.plain_ms:.2f} ms, "
            f"{live.speedup:.2f} times{promise}. {name.capitalize()} {_pc(policy.value)} "
            f"({_pc(policy.low)} to {_pc(policy.high)}) against {_pc(self.plain[0])} of the plain model, on rows that "
            "neither training nor calibration saw."
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {"kind": KIND, "version": VERSION, "fields": dataclasses.asdict(self)}

    def save(self, path: str | Path) -> Path:
        """The path, after the report was written to it as JSON (atomically)."""
        return write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """The report in a file that `save` wrote.

        Raises:
            FormatError: the file is missing, damaged, no report, or from a newer version.
        """
        value = read_json(path)
        if value.get("kind") != KIND or value.get("version") != VERSION or not isinstance(value.get("fields"), dict):
            raise FormatError(f"{path} is no report of version {VERSION}. Write it again: offramp report RUN")
        try:
            return _made(cls, value["fields"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{path} is a damaged report: {error}. Write it again: offramp report RUN") from None


def _made(kind: Any, value: Any) -> Any:
    """A dataclass of this file, or a tuple of them, from JSON values."""
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        known = {item.name for item in dataclasses.fields(kind)}
        if not isinstance(value, dict) or not set(value) <= known:
            raise ValueError("it has unknown fields")
        return kind(**{name: _made(hints[name], part) for name, part in value.items()})  # type: ignore[operator]
    if get_origin(kind) is tuple:
        arguments = get_args(kind)
        if not isinstance(value, list):
            raise ValueError("a list is missing")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_made(arguments[0], part) for part in value)
        return tuple(_made(argument, part) for argument, part in zip(arguments, value, strict=True))
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{value!r} is no number")
        return float(value)
    if kind in (int, str) and type(value) is not kind:
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


def _against(value: float, plain: float) -> str:
    points = 100 * (plain - value)
    return f"at {points:.1f} points below" if points >= 0.05 else "at no measured loss"


def _pc(share: float) -> str:
    return f"{100 * share:.1f} %"
