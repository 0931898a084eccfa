"""What the calibration rows looked like to a policy."""

import base64
import binascii
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from offramp.cost import CostModel
from offramp.errors import FormatError, ShapeError, ValueRangeError
from offramp.policies import JEIDNN, ZTW, AccuracyBins, EENet, MaxProb, Policy, Stopping, dumps
from offramp.policies.base import check_exits
from offramp.scores import max_prob
from offramp.simulate import Walk, walk
from offramp.trace import ExitTrace

__all__ = ["LEARNED", "Reference", "Sample", "fitting", "left_at", "observed", "reference"]

KIND, VERSION = "offramp.reference", 1
POINTS = 129  # order statistics that are kept of a sample

#: Their scores were fitted to the calibration rows, which therefore score unlike new rows of the same kind.
LEARNED = (AccuracyBins, EENet, JEIDNN, Stopping, ZTW)


@dataclass(frozen=True)
class Sample:
    """Order statistics of one score of all reference rows at one exit, before anybody left.

    Args:
        of: "score", the policy's, or "max-prob".
        exit: 0-based.
        points: float32 values at `Reference.ranks`, rising.
    """

    of: str
    exit: int
    points: tuple[float, ...]


@dataclass(frozen=True)
class Reference:
    """What the calibration rows looked like to one policy: some kilobytes, whatever the number of rows.

    Order statistics with known ranks are kept, not interpolated quantiles: between two of them the distribution is
    known to lie in a band, so that a distance to the band is never above the true one, and tests err on the safe side.

    Args:
        policy: a checksum of the policy.
        classes: of the trace.
        left: the number of rows that left at each exit [exit].
        samples: the scores that are tested.
    """

    policy: str
    classes: int
    left: tuple[int, ...]
    samples: tuple[Sample, ...]

    def __post_init__(self) -> None:
        good = self.rows > 0 and min(self.left) >= 0 and self.classes > 0
        for sample in self.samples:
            rises = len(sample.points) > 0 and all(map(math.isfinite, sample.points))
            rises = rises and list(sample.points) == sorted(sample.points)
            good = good and rises and 0 <= sample.exit < self.exits and len(sample.points) == self._points
        if not good or len(self.ranks) != self._points:
            raise ValueRangeError("a reference has rows, and finite rising points of every exit. Make it again.")

    @property
    def exits(self) -> int:
        """E, the number of exits."""
        return len(self.left)

    @property
    def rows(self) -> int:
        """The number of calibration rows."""
        return sum(self.left)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of rows that left at each exit."""
        return tuple(count / self.rows for count in self.left)

    @property
    def _points(self) -> int:
        return len(self.samples[0].points) if self.samples else 0

    @property
    def ranks(self) -> Int[np.ndarray, "point"]:
        """The ranks of the points among the rows, 1-based, int64 [point]."""
        return _ranks(self.rows, self._points)

    @property
    def coarse(self) -> float:
        """The share of rows between two points, which their band hides; 0 when every row is a point."""
        return float(np.diff(self.ranks, prepend=0).max() - 1) / self.rows

    def to_dict(self) -> dict[str, Any]:
        """The reference as a JSON object; the points are little-endian float32 in base64."""
        samples = [
            {"of": s.of, "exit": s.exit, "points": base64.b64encode(np.asarray(s.points, "<f4").tobytes()).decode()}
            for s in self.samples
        ]
        fields = {"policy": self.policy, "classes": self.classes, "left": list(self.left), "samples": samples}
        return {"kind": KIND, "version": VERSION, "fields": fields}

    @classmethod
    def from_dict(cls, value: Any) -> "Reference":
        """The reference that `to_dict` described.

        Raises:
            FormatError: the object is no reference, is damaged, or from a newer version.
        """
        if not isinstance(value, dict) or set(value) != {"kind", "version", "fields"} or value["kind"] != KIND:
            raise FormatError(f"not a reference: expected an object of kind {KIND!r}. Make the reference again.")
        if type(value["version"]) is not int or value["version"] != VERSION:
            raise FormatError(f"a reference of version {value['version']!r}; this Offramp reads {VERSION}. Update.")
        try:
            fields = dict(value["fields"])
            samples = []
            for sample in fields.pop("samples"):
                data = base64.b64decode(sample["points"], validate=True)
                points = tuple(np.frombuffer(data, "<f4").astype(float).tolist())
                samples.append(Sample(**{**sample, "exit": _whole(sample["exit"]), "points": points}))
            left = tuple(_whole(count) for count in fields.pop("left"))
            return cls(left=left, samples=tuple(samples), **{**fields, "classes": _whole(fields["classes"])})
        except (TypeError, KeyError, ValueError, AttributeError, binascii.Error) as error:
            raise FormatError(f"a damaged reference: {error}. Make the reference again.") from None


def reference(policy: Policy, trace: ExitTrace, *, points: int | None = POINTS) -> Reference:
    """What the calibration rows look like to a policy: exit shares, max-prob at every visited exit, and the policy's
    own score there, unless it is max-prob or was learned from these rows.

    Args:
        points: how many order statistics to keep of each; None keeps all.

    Raises:
        ShapeError: the policy is for another number of exits, or needs signals that the trace lacks.
    """
    walked = walk(policy, trace)
    ranks = _ranks(trace.rows, points or trace.rows)
    samples = []
    for of, exit_, values in observed(policy, trace, walked):
        samples.append(Sample(of, exit_, tuple(np.sort(values)[ranks - 1].astype(float).tolist())))
    return Reference(_checksum(policy), trace.classes, left_at(walked, trace.exits), tuple(samples))


def fitting(policy: Policy, before: Reference | ExitTrace, new: ExitTrace, costs: CostModel) -> Reference:
    """The reference, when everything is for the same model and policy."""
    for what, value, kinds in (("new", new, ExitTrace), ("costs", costs, CostModel)):
        if not isinstance(value, kinds):
            raise ShapeError(f"{what} is {type(value).__name__}; expected {kinds.__name__}.")
    if not isinstance(before, Reference | ExitTrace):
        raise ShapeError(f"before is {type(before).__name__}; expected a Reference or the trace of calibration rows.")
    check_exits(policy, new.exits)
    if before.exits != new.exits or before.classes != new.classes or costs.exits != new.exits:
        raise ShapeError(
            f"the calibration rows have {before.exits} exits and {before.classes} classes, the new rows {new.exits} "
            f"and {new.classes}, the costs {costs.exits} exits. Record and measure the same model."
        )
    if isinstance(before, ExitTrace):
        return reference(policy, before, points=None)
    if before.policy != _checksum(policy):
        raise ValueRangeError("the reference is of another policy. Make one for this: reference(policy, trace).")
    return before


def observed(policy: Policy, trace: ExitTrace, walked: Walk) -> Iterator[tuple[str, int, Float[np.ndarray, "row"]]]:
    """(what, exit, float32 values of all rows) of everything that is compared."""
    for k in walked.visited:
        yield "max-prob", k, max_prob(trace.logits[k]).numpy()
    if not isinstance(policy, (MaxProb, *LEARNED)):
        for k, score in zip(walked.visited, walked.score, strict=True):
            yield "score", k, score.float().numpy()


def left_at(walked: Walk, exits: int) -> tuple[int, ...]:
    """How many rows left at each exit."""
    first = torch.tensor(walked.visited)[walked.stop.int().argmax(dim=0)]
    return tuple(torch.bincount(first, minlength=exits).tolist())


def _ranks(rows: int, points: int) -> np.ndarray:
    return np.unique(np.floor(np.linspace(1, rows, min(points, rows)) + 0.5).astype(np.int64))


def _checksum(policy: Policy) -> str:
    return hashlib.sha256(dumps(policy).encode()).hexdigest()[:16]


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is no whole number")
    return value
