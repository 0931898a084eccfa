"""What a bench found, as values: cells, engines, and how both are written as JSON."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from offramp.errors import FormatError

__all__ = [
    "KIND", "Bench", "Cell", "EngineFacts", "Foreign", "Instead", "Rate", "Shorter", "Tail", "Threshold", "Took",
    "cell_of", "facts_of",
]  # fmt: skip

KIND, VERSION = "offramp.bench", 2


@dataclass(frozen=True)
class Took:
    """Median milliseconds a batch, their interquartile range over rounds, and rows a second."""

    median_ms: float
    spread_ms: float
    rows_per_s: float


@dataclass(frozen=True)
class Rate:
    """A share or a difference of two, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Tail:
    """Milliseconds of single calls at batch 1: (p50, p95, p99) over `calls` calls on `rows` different rows."""

    calls: int
    rows: int
    live: tuple[float, float, float]
    whole: tuple[float, float, float]


@dataclass(frozen=True)
class Shorter:
    """The shallower network that is about as right: the model up to an exit, that exit's head, no other head.

    Args:
        exit: the first exit that is at least as right as the policy on these rows; None when only the whole model is,
            or nothing.
        note: which of these it is, as a sentence; "" when there is an exit.
        accuracy: of that exit on all judged rows.
        took: its time, in turns with the others.
    """

    exit: int | None = None
    note: str = ""
    accuracy: Rate | None = None
    took: Took | None = None


@dataclass(frozen=True)
class Cell:
    """One policy on one engine in one precision at one batch size.

    Args:
        engine, precision, policy, batch_size: which one.
        batches, rows, rounds: batches and rows in a round, and rounds that were timed.
        live: the policy's run, heads, steps and regrouping included.
        whole: the same engine's model without exits (for eager in the model's own precision the faster of the model as
            it was written and its exported graph).
        eager: the model as it was written, in torch eager and in its own precision.
        unused: every exit visited and none taken; None for families that have no such thresholds.
        speedup, eager_speedup, whole_eager_speedup: whole over live, eager over live, eager over whole.
        promise: the speed-up that the stages alone allow, each run on the very rows that reached it, in turns with the
            others: no head, no step, no regrouping.
        shares: of the timed rows that left at each exit.
        judged: rows that accuracies are of, the timed ones among them.
        accuracy, whole_accuracy, plain_accuracy: live, of the same engine's whole model, and of the model in its own
            precision, on the same rows.
        lost: the live accuracy less the plain one, paired over rows.
        shorter: what a shallower network does instead.
        tail: single calls; at batch 1 only.
    """

    engine: str
    precision: str
    policy: str
    batch_size: int
    batches: int
    rows: int
    rounds: int
    live: Took
    whole: Took
    eager: Took
    unused: Took | None
    speedup: float
    eager_speedup: float
    whole_eager_speedup: float
    promise: float
    shares: tuple[float, ...]
    judged: int
    accuracy: Rate
    whole_accuracy: Rate
    plain_accuracy: Rate
    lost: Rate
    shorter: Shorter
    tail: Tail | None = None

    @property
    def name(self) -> str:
        """The engine with its precision, as the command line writes it."""
        return f"{self.engine}:{self.precision}"

    @property
    def kept(self) -> float:
        """The part of the promise that the live run kept."""
        return self.speedup / self.promise

    @property
    def unused_time(self) -> float | None:
        """The time with every exit visited and none taken, as a multiple of the whole model's."""
        return None if self.unused is None else self.unused.median_ms / self.whole.median_ms


@dataclass(frozen=True)
class Threshold:
    """How a policy's thresholds were found.

    Args:
        made_on: the precision of the logits.
        status: of the calibration, or "as given".
        cost: the mean cost that was reached (counted); None for a policy that was given.
        exits: those that are on; () when all are.
    """

    made_on: str
    status: str
    cost: float | None
    exits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Foreign:
    """What thresholds calibrated on the model's own precision do on an engine's logits, over all judged rows.

    Args:
        changed: share of rows that leave at another exit than they do in the model's own precision.
        accuracy: with those thresholds.
        cost: mean cost with them, counted.
        own_accuracy, own_cost: with thresholds calibrated on the engine's logits.
    """

    changed: float
    accuracy: Rate
    cost: float
    own_accuracy: Rate
    own_cost: float


@dataclass(frozen=True)
class EngineFacts:
    """One engine in one precision.

    Args:
        engine, precision: which one.
        why: why it did not run, or not to its end; "" when it did.
        made_s: seconds to make it and its first runtime; less when graphs and code are in the cache.
        peak_mb, kept_mb: growth of the process while it was made and ran one batch of the largest size under a policy
            that visits every exit, at the most and afterwards; None where the system does not tell.
        exits: accuracy of each exit in this engine's arithmetic.
        thresholds: by policy.
        foreign: by family, for other precisions than the model's own.
    """

    engine: str
    precision: str
    why: str = ""
    made_s: float = 0.0
    peak_mb: float | None = None
    kept_mb: float | None = None
    exits: tuple[float, ...] = ()
    thresholds: Mapping[str, Threshold] = field(default_factory=dict)
    foreign: Mapping[str, Foreign] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The engine with its precision."""
        return f"{self.engine}:{self.precision}"

    def beside(self, before: "EngineFacts") -> "EngineFacts":
        """These facts and those of an earlier run, whose cells are kept: policies of both; where this one did not get
        ready, what was known."""
        if not self.thresholds:
            return dataclasses.replace(before, why=self.why)
        return dataclasses.replace(
            self, thresholds={**before.thresholds, **self.thresholds}, foreign={**before.foreign, **self.foreign}
        )


@dataclass(frozen=True)
class Instead:
    """The fastest thing without early exits that is at least as right as a cell: a whole model, or a fixed exit.

    Args:
        what: in words.
        accuracy: its own.
        ratio: how many times as fast the cell is; both against torch eager, measured beside each.
    """

    what: str
    accuracy: float
    ratio: float


@dataclass(frozen=True)
class Bench:
    """Everything that was measured.

    Args:
        title: of the model.
        machine: a line.
        versions: of packages.
        settings: what cells must share to be in one table.
        engines: in the order that was asked for.
        cells: in the order of measuring.
    """

    title: str
    machine: str
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    engines: tuple[EngineFacts, ...] = ()
    cells: tuple[Cell, ...] = ()

    def instead(self, cell: Cell) -> Instead | None:
        """What one would pick instead of a cell, of all engines at that batch size; None when nothing is as right."""
        found: dict[str, tuple[float, float]] = {}
        for other in self.cells:
            if other.batch_size != cell.batch_size:
                continue
            found.setdefault(f"{other.name} whole", (other.whole_accuracy.value, other.whole_eager_speedup))
            short = other.shorter
            if short.took is not None and short.accuracy is not None:
                fast = other.eager.median_ms / short.took.median_ms
                found.setdefault(f"{other.name} cut at exit {short.exit}", (short.accuracy.value, fast))
        able = {what: fast for what, (right, fast) in found.items() if right >= cell.accuracy.value}
        if not able:
            return None
        what = max(able, key=lambda each: able[each])
        return Instead(what, found[what][0], cell.eager_speedup / able[what])

    def headline(self) -> str:
        """The answer in one sentence: the largest gain over the fastest thing without exits that is as right. Not of
        "int8-batch", where a row's answer depends on its neighbours, unless there is nothing else."""
        if not self.cells:
            return "Nothing was measured."
        cells = [cell for cell in self.cells if cell.precision != "int8-batch"] or self.cells
        found = [(other.ratio, cell, other) for cell in cells if (other := self.instead(cell)) is not None]
        if not found:
            return "Nothing without exits is as right as the policies here."
        ratio, cell, other = max(found, key=lambda each: each[0])
        if ratio <= 1:
            return "Exits do not pay here: for every policy something without exits is as right and as fast."
        return (
            f"{cell.policy} on {cell.name} answers {ratio:.2f} times as many rows at batch {cell.batch_size} as "
            f"{other.what}, the fastest thing without exits that is as right: {100 * cell.accuracy.value:.1f} % right, "
            f"{100 * cell.plain_accuracy.value:.1f} % the plain model."
        )

    def to_dict(self) -> dict[str, Any]:
        """The bench as a JSON object; what follows from other figures stands beside them."""
        fields = dataclasses.asdict(self)
        for value, cell in zip(fields["cells"], self.cells, strict=True):
            other = self.instead(cell)
            value |= {
                "kept": cell.kept,
                "unused_time": cell.unused_time,
                "instead": None if other is None else dataclasses.asdict(other),
            }
        return {"kind": KIND, "version": VERSION, "fields": fields}

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> "Bench":
        """The bench that `to_dict` gave.

        Raises:
            FormatError: it is none, or damaged, or from a newer version.
        """
        fields = value.get("fields")
        if value.get("kind") != KIND or value.get("version") != VERSION or not isinstance(fields, dict):
            raise FormatError(f"it is no bench of version {VERSION}.")
        try:
            return cls(
                **{
                    **fields,
                    "engines": tuple(facts_of(each) for each in fields["engines"]),
                    "cells": tuple(cell_of(each) for each in fields["cells"]),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"it is a damaged bench: {error}.") from None


def cell_of(value: Mapping[str, Any]) -> Cell:
    """The cell in a JSON object."""
    fields = {f.name: value[f.name] for f in dataclasses.fields(Cell)}
    for name in ("live", "whole", "eager", "unused"):
        fields[name] = _made(Took, fields[name])
    for name in ("accuracy", "whole_accuracy", "plain_accuracy", "lost"):
        fields[name] = _made(Rate, fields[name])
    short = fields["shorter"]
    fields["shorter"] = Shorter(
        short["exit"], short["note"], _made(Rate, short["accuracy"]), _made(Took, short["took"])
    )
    tail = fields["tail"]
    fields["tail"] = tail and Tail(tail["calls"], tail["rows"], tuple(tail["live"]), tuple(tail["whole"]))
    return Cell(**{**fields, "shares": tuple(fields["shares"])})


def facts_of(value: Mapping[str, Any]) -> EngineFacts:
    """The facts of an engine in a JSON object."""
    fields = {f.name: value[f.name] for f in dataclasses.fields(EngineFacts)}
    fields["exits"] = tuple(fields["exits"])
    fields["thresholds"] = {
        name: Threshold(**{**each, "exits": tuple(each["exits"])}) for name, each in fields["thresholds"].items()
    }
    fields["foreign"] = {
        name: Foreign(**{**each, **{key: Rate(**each[key]) for key in ("accuracy", "own_accuracy")}})
        for name, each in fields["foreign"].items()
    }
    return EngineFacts(**fields)


def _made(kind: Any, fields: Mapping[str, Any] | None) -> Any:
    return None if fields is None else kind(**fields)
