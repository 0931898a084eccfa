"""What a row costs: per stage and head, as a fraction of the plain model, in FLOPs, and in measured seconds."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from offramp.artefacts import read_json, write_json
from offramp.errors import FormatError, ShapeError, ValueRangeError

__all__ = ["Budget", "CostModel", "TimedCosts"]

KIND, VERSION = "offramp.costs", 1


@dataclass(frozen=True)
class Budget:
    """What an average row may cost. Exactly one of the three amounts is given.

    Args:
        fraction: of the plain model's cost, e.g. 0.5.
        flops: FLOPs a row (a multiply-add counts 2).
        ms: milliseconds a batch of `batch_size` rows, by the measured times of the cost model.
        batch_size: the size that `ms` is meant for.
    """

    fraction: float | int | None = None
    flops: float | int | None = None
    ms: float | int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        given = [(n, getattr(self, n)) for n in ("fraction", "flops", "ms") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueRangeError(f"a Budget has one amount; got {len(given)}. Give fraction=, flops= or ms=.")
        name, amount = given[0]
        if isinstance(amount, bool) or not isinstance(amount, Real) or not math.isfinite(amount) or amount <= 0:
            raise ValueRangeError(f"Budget({name}={amount!r}) must be a finite number above 0.")
        object.__setattr__(self, name, float(amount))
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueRangeError(f"batch_size is {self.batch_size!r}; expected a whole number, at least 1.")

    @property
    def unit(self) -> str:
        """fraction, flops or ms."""
        return "fraction" if self.fraction is not None else "flops" if self.flops is not None else "ms"

    @property
    def amount(self) -> float:
        """The amount, in its unit."""
        return float(getattr(self, self.unit))

    def __str__(self) -> str:
        if self.unit == "fraction":
            return f"{self.amount:.4g} of the plain model"
        if self.unit == "flops":
            return f"{self.amount:.4g} FLOPs a row"
        return f"{self.amount:.4g} ms at batch {self.batch_size}"


@dataclass(frozen=True)
class TimedCosts:
    """Measured seconds of one call at one batch size, medians.

    Args:
        batch_size: rows in the call.
        plain_s: the whole model without exits.
        stage_s: each stage alone, per exit.
        head_s: each head alone, per exit; 0.0 for the last, whose head is part of the model.
        step_s: one step of the policy, per exit; 0.0 until it was measured.
        spread_s: the interquartile range of `plain_s`.
        regroup_s: taking half of the rows out of the batch behind each exit, 0.0 for the last; () until measured.
    """

    batch_size: int
    plain_s: float
    stage_s: tuple[float, ...]
    head_s: tuple[float, ...]
    step_s: float = 0.0
    spread_s: float = 0.0
    regroup_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueRangeError(f"batch_size is {self.batch_size!r}; expected a whole number, at least 1.")
        times = (self.plain_s, *self.stage_s, *self.head_s, *self.regroup_s, self.step_s, self.spread_s)
        if not all(math.isfinite(s) and s >= 0 for s in times) or self.plain_s <= 0:
            raise ValueRangeError(f"times at batch {self.batch_size} must be finite, at least 0, and plain_s above 0.")


@dataclass(frozen=True)
class CostModel:
    """Costs of stages and heads, for one row and, where measured, in seconds at several batch sizes.

    Args:
        stage: cost of each stage for one row, as a fraction of the plain model.
        head: cost of each head for one row, likewise; 0.0 for the last exit.
        plain_flops: FLOPs of the plain model for one row, or None when they were not counted.
        timed: measured times, by rising batch size.
        machine: a line that says where the times were measured.
        engine, precision: what they were measured with.
    """

    stage: tuple[float, ...]
    head: tuple[float, ...]
    plain_flops: float | None = None
    timed: tuple[TimedCosts, ...] = ()
    machine: str = ""
    engine: str = "eager"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if not self.stage or len(self.stage) != len(self.head):
            raise ShapeError(f"{len(self.stage)} stage and {len(self.head)} head costs; expected one each per exit.")
        if not all(math.isfinite(c) and c >= 0 for c in (*self.stage, *self.head)) or sum(self.stage) <= 0:
            raise ValueRangeError("costs must be finite, at least 0, and not all 0.")
        for row in self.timed:
            lengths = {len(row.stage_s), len(row.head_s), len(row.regroup_s) or self.exits}
            if lengths != {self.exits}:
                raise ShapeError(f"times at batch {row.batch_size} are not for {self.exits} exits. Measure again.")
        sizes = [row.batch_size for row in self.timed]
        if sizes != sorted(set(sizes)):
            raise ValueRangeError(f"times are given for batch sizes {sizes}; expected each once, rising.")

    @classmethod
    def from_costs(cls, cumulative: Sequence[float | int], *, plain: float | int | None = None) -> "CostModel":
        """A cost model from the cumulative cost up to each exit, in any unit.

        Args:
            cumulative: rising, one per exit, heads included.
            plain: the plain model's cost in the same unit; by default that of the last exit.

        Example:
            >>> CostModel.from_costs((0.2, 0.6, 1.0)).cumulative()
            (0.2, 0.6, 1.0)
        """
        values = tuple(float(c) for c in cumulative)
        plain = values[-1] if plain is None and values else plain
        steps = [b - a for a, b in zip((0.0, *values), values, strict=False)]
        if not values or not all(map(math.isfinite, values)) or min(steps) < 0 or values[0] <= 0 or not plain:
            raise ValueRangeError(f"cumulative costs {values} must be above 0 and not fall from exit to exit.")
        return cls(stage=tuple(s / plain for s in steps), head=(0.0,) * len(values))

    @property
    def exits(self) -> int:
        """E, the number of exits."""
        return len(self.stage)

    def measured_with(self, engine: str, precision: str) -> bool:
        """Whether there are times, measured with this engine in this precision."""
        return bool(self.timed) and (self.engine, self.precision) == (engine, precision)

    def visited(self, enabled: tuple[bool, ...] | None) -> tuple[bool, ...]:
        """Which heads run: those switched on, and the last."""
        if enabled is not None and len(enabled) != self.exits:
            raise ShapeError(f"enabled has {len(enabled)} flags, but the cost model has {self.exits} exits.")
        return tuple(k == self.exits - 1 or enabled is None or enabled[k] for k in range(self.exits))

    def cumulative(self, enabled: tuple[bool, ...] | None = None) -> tuple[float, ...]:
        """The cost of a row that leaves at each exit, as a fraction of the plain model. Heads that are off are free."""
        total, costs = 0.0, []
        for stage, head, on in zip(self.stage, self.head, self.visited(enabled), strict=True):
            total += stage + head * on
            costs.append(round(total, 12))
        return tuple(costs)

    def spent(self, shares: Sequence[float | int], budget: Budget, enabled: tuple[bool, ...] | None = None) -> float:
        """The mean cost in the budget's unit, when `shares[k]` of the rows leave at exit k.

        Raises:
            ValueRangeError: the unit was not measured.
        """
        if budget.unit == "ms":
            return 1000.0 * self.seconds(shares, budget.batch_size, enabled)
        fraction = sum(s * c for s, c in zip(shares, self.cumulative(enabled), strict=True))
        if budget.unit == "fraction":
            return fraction
        if self.plain_flops is None:
            raise ValueRangeError("the cost model has no FLOPs. Use measure(...), or Budget(fraction=...).")
        return fraction * self.plain_flops

    def plain(self, budget: Budget) -> float:
        """The plain model's cost in the budget's unit."""
        if budget.unit == "fraction":
            return 1.0
        if budget.unit == "flops":
            return self.spent([0.0] * (self.exits - 1) + [1.0], budget) / self.cumulative()[-1]
        return 1000.0 * self.plain_s(budget.batch_size)

    def seconds(self, shares: Sequence[float | int], batch_size: int, enabled: tuple[bool, ...] | None = None) -> float:
        """The expected seconds of a batch whose rows leave independently with these shares, regrouped at every exit.

        A stage runs on the rows that reach it: their number is binomial, and a stage that nobody reaches takes no time.
        """
        on, total, reach = self.visited(enabled), 0.0, 1.0
        for k in range(self.exits):
            stage = self._times("stage_s", k)
            head = self._times("head_s", k)
            step = self._times("step_s")
            for rows, chance in _binomial(batch_size, min(1.0, max(0.0, reach))):
                spent = _interpolate(stage, rows)
                if on[k]:
                    spent += _interpolate(head, rows) + _interpolate(step, rows)
                    spent += _some_leave(shares[k] / max(reach, 1e-12), rows) * self.regroup_s(k, rows)
                total += chance * spent
            reach -= shares[k]
        return total

    def promise(self, shares: Sequence[float | int], batch_size: int) -> float:
        """The speed-up that stages alone allow: plain time over the stages' times at the sizes that reach them.

        Heads, policy and regrouping are left out; what a runtime keeps of this is its quality.
        """
        bare = dataclasses.replace(
            self,
            timed=tuple(
                dataclasses.replace(t, head_s=(0.0,) * self.exits, step_s=0.0, regroup_s=()) for t in self.timed
            ),
        )
        return self.plain_s(batch_size) / bare.seconds(shares, batch_size)

    def plain_s(self, rows: int) -> float:
        """Seconds of the plain model on one batch of so many rows."""
        return _interpolate(self._times("plain_s"), rows)

    def span_s(self, k: int, following: int, rows: int) -> float:
        """Seconds from behind exit k to the end of the step at the next visited exit, for a batch of so many rows."""
        total = sum(_interpolate(self._times("stage_s", j), rows) for j in range(k + 1, following + 1))
        return total + _interpolate(self._times("head_s", following), rows) + _interpolate(self._times("step_s"), rows)

    def regroup_s(self, k: int, rows: int) -> float:
        """Seconds of taking rows out of a batch of so many behind exit k; 0.0 where that was not measured."""
        if not all(row.regroup_s for row in self.timed):
            return 0.0
        return _interpolate(self._times("regroup_s", k), rows)

    def stages_s(self, left: Sequence[int]) -> float:
        """Seconds of the stages alone for one batch of which `left[k]` rows leave at exit k."""
        total, reach = 0.0, sum(left)
        for k in range(self.exits):
            total += _interpolate(self._times("stage_s", k), reach)
            reach -= left[k]
        return total

    def _times(self, name: str, k: int | None = None) -> list[tuple[int, float]]:
        if not self.timed:
            raise ValueRangeError("the cost model has no measured times. Use measure(...), or Budget(fraction=...).")
        return [(t.batch_size, getattr(t, name) if k is None else getattr(t, name)[k]) for t in self.timed]

    def save(self, path: str | Path) -> Path:
        """The path, after the costs were written to it as JSON (atomically)."""
        return write_json(path, {"kind": KIND, "version": VERSION, "fields": dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> "CostModel":
        """The cost model in a file that `save` wrote.

        Raises:
            FormatError: the file is missing, damaged, not a cost model, or from a newer version.
        """
        value: dict[str, Any] = read_json(path)
        if value.get("kind") != KIND or value.get("version") != VERSION or not isinstance(value.get("fields"), dict):
            raise FormatError(f"{path} is not a cost model of version {VERSION}. Measure again.")
        try:
            fields = dict(value["fields"])
            timed = tuple(
                TimedCosts(**{**t, **{name: tuple(t.get(name, ())) for name in ("stage_s", "head_s", "regroup_s")}})
                for t in fields.pop("timed", ())
            )
            return cls(**{**fields, "stage": tuple(fields["stage"]), "head": tuple(fields["head"])}, timed=timed)
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise FormatError(f"{path} is a damaged cost model: {error}. Measure again.") from None


def _interpolate(points: list[tuple[int, float]], rows: int) -> float:
    """Seconds at `rows`: linear between measured sizes, proportional beyond the largest; no rows take no time."""
    if rows <= 0:
        return 0.0
    if rows <= points[0][0]:
        return points[0][1]
    for (low, a), (high, b) in itertools.pairwise(points):
        if rows <= high:
            return a + (b - a) * (rows - low) / (high - low)
    size, last = points[-1]
    return last * rows / size


def _some_leave(share: float, rows: int) -> float:
    """The chance that of so many rows some leave and some go on."""
    share = min(1.0, max(0.0, share))
    return 0.0 if rows < 2 else 1.0 - share**rows - (1.0 - share) ** rows


def _binomial(rows: int, chance: float) -> list[tuple[int, float]]:
    """(n, P(n rows go on)) where that is not negligible."""
    if chance <= 0.0 or chance >= 1.0:
        return [(rows if chance >= 1.0 else 0, 1.0)]
    log = [
        math.lgamma(rows + 1) - math.lgamma(n + 1) - math.lgamma(rows - n + 1)
        + n * math.log(chance) + (rows - n) * math.log1p(-chance)
        for n in range(rows + 1)
    ]  # fmt: skip
    return [(n, math.exp(v)) for n, v in enumerate(log) if v > -30.0]
