"""What is to be benched: engines in precisions, batch sizes, policies, and for how long."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from offramp.choices import CHOICES
from offramp.data import Examples
from offramp.engines import ENGINES
from offramp.engines.choose import HOMES
from offramp.errors import DataError, ValueRangeError
from offramp.model import ExitModel
from offramp.policies import Policy

__all__ = ["DEFAULT", "Pair", "Plan", "Subject", "pairs_of"]

#: What is benched unless engines are named: every engine, and one file in whole numbers.
DEFAULT = (*ENGINES, "onnx-file:int8", "onnx-file:int8-batch")
#: Rows that a policy is calibrated on, at the least.
FEWEST = 10


@dataclass(frozen=True)
class Pair:
    """An engine in a precision; None is the model's own."""

    engine: str
    precision: str | None = None

    def named(self, own: str) -> str:
        """As the command line writes it, for a model whose own precision is `own`."""
        return f"{self.engine}:{self.precision or own}"


def pairs_of(names: Sequence[str]) -> tuple[Pair, ...]:
    """Engines in precisions from names such as "eager" and "onnx-file:int8".

    Raises:
        ValueRangeError: there is no such engine, or it never has that precision, or a name stands twice.
    """
    pairs = []
    for name in names:
        engine, _, precision = name.partition(":")
        if engine not in HOMES:
            raise ValueRangeError(f"the engine is {engine!r}; expected some of {', '.join(ENGINES)}.")
        module, kind = HOMES[engine].split(".")
        has: Any = getattr(import_module(f"offramp.engines.{module}"), kind)
        known = tuple(dict.fromkeys((*has.own, *has.others)))
        if precision and precision not in known:
            raise ValueRangeError(f"the engine {engine} has no precision {precision!r}; it has {', '.join(known)}.")
        pairs.append(Pair(engine, precision or None))
    if not pairs or len(set(pairs)) != len(pairs):
        raise ValueRangeError(f"the engines are {', '.join(names) or 'none'}; expected different ones, at least one.")
    return tuple(pairs)


@dataclass(frozen=True)
class Plan:
    """What is to be benched.

    Args:
        engines: names such as "onnx-file:int8".
        batch_sizes: rows in a batch.
        policies: names in the subject, or families of `offramp.choices.CHOICES`, calibrated for each engine.
        fraction: what a family may spend, of the plain model's FLOPs.
        thin: a family does with fewer exits, as long as no fewer of the rows that it is calibrated on are right.
        rows: timed in one round, at least two batches where there are so many rows; 32 to 128 by `seconds` unless
            given.
        seconds: about so long for each cell, three rounds at the least.
        stage_seconds: about so long for the stages at each size; a thirtieth of `seconds` unless given.
        calls: single rows whose time is taken one by one at batch 1.
        threads: torch's number unless given.

    Raises:
        ValueRangeError: a number is out of range, or a name unknown or twice.
    """

    engines: tuple[str, ...] = DEFAULT
    batch_sizes: tuple[int, ...] = (1, 8, 32, 128)
    policies: tuple[str, ...] = ("max-prob", "beem-a")
    fraction: float = 0.5
    thin: bool = False
    rows: int | None = None
    seconds: float = 20.0
    stage_seconds: float | None = None
    calls: int = 200
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("engines", "batch_sizes", "policies"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        whole = {"batch_sizes": self.batch_sizes, "calls": (self.calls,)}
        whole |= {name: (value,) for name in ("rows", "threads") if (value := getattr(self, name)) is not None}
        for name, numbers in whole.items():
            if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers):
                got = ", ".join(map(str, numbers)) or "none"
                raise ValueRangeError(f"{name} is {got}; expected whole numbers of at least 1.")
        for name in ("fraction", "seconds", "stage_seconds"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueRangeError(f"{name} is {value}; expected a number above 0.")
        for name in ("batch_sizes", "policies"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueRangeError(
                    f"{name} are {', '.join(map(str, values))}; expected different ones, at least one."
                )
        pairs_of(self.engines)

    def timed_rows(self, size: int) -> int:
        """Rows in a round of batches of `size`."""
        rows = self.rows if self.rows is not None else min(128, max(32, round(8 * self.seconds)))
        return max(rows, 2 * size)

    @property
    def for_stages_s(self) -> float:
        """Seconds for the stages at each size."""
        return self.stage_seconds if self.stage_seconds is not None else max(0.1, self.seconds / 30)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, and the rows that it is benched on.

    Args:
        model: from `attach`, or of a bundle, on the CPU.
        test: rows that are timed and judged, with labels; neither training nor calibration saw them.
        fit: rows that families are calibrated on; None where all policies are named.
        named: (policy, precision of the logits that it was calibrated on) by name.
        title: what it is called.

    Raises:
        DataError: the test rows have no labels.
    """

    model: ExitModel
    test: Examples
    fit: Examples | None = None
    named: Mapping[str, tuple[Policy, str]] = field(default_factory=dict)
    title: str = ""

    def __post_init__(self) -> None:
        if self.test.labels is None:
            raise DataError(
                "the rows to bench on have no labels, so nothing can be said of accuracy. Give labelled rows."
            )

    def check(self, plan: Plan) -> None:
        """Nothing, when the plan can be carried out with these rows.

        Raises:
            ValueRangeError: a policy is neither named here nor a family.
            DataError: there are too few rows for a batch size, or to calibrate on, or heads lack signals.
        """
        for name in plan.policies:
            if name in self.named:
                continue
            if name not in CHOICES:
                known = f"{', '.join(self.named)} here, " if self.named else ""
                raise ValueRangeError(f"the policy is {name!r}; expected {known}or a family of {', '.join(CHOICES)}.")
            missing = [signal for signal in CHOICES[name][0].needs if signal not in self.model.signals]
            if missing:
                raise DataError(f"{name} needs the signal {missing[0]!r}, which the heads lack: offramp certainty RUN.")
            if self.fit is None or self.fit.labels is None or len(self.fit) < FEWEST:
                raise DataError(f"{name} is to be calibrated; give at least {FEWEST} labelled rows for that.")
        if len(self.test) < max(plan.batch_sizes):
            raise DataError(
                f"there are {len(self.test)} rows to time, fewer than one batch of {max(plan.batch_sizes)}. "
                "Give smaller batch sizes, or more rows."
            )
