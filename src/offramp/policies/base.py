"""What a policy is, and the few helpers that every policy shares."""

import math
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from offramp.errors import ShapeError, ValueRangeError

__all__ = [
    "NEVER",
    "Evidence",
    "Policy",
    "State",
    "Step",
    "as_flags",
    "as_floats",
    "at_exit",
    "check_exits",
    "check_signals",
    "fires",
    "visits",
]

State = tuple[Tensor, ...]

#: A score that is no more than this says that a row cannot leave here at any threshold.
NEVER = -1e8


class Evidence(NamedTuple):
    """What a policy sees at one exit."""

    logits: Float[Tensor, "batch cls"]
    signals: Float[Tensor, "batch sig"] | None = None


class Step(NamedTuple):
    """What a policy says at one exit."""

    stop: Bool[Tensor, "batch"]
    score: Float[Tensor, "batch"]
    answer: Float[Tensor, "batch cls"]
    state: State


@runtime_checkable
class Policy(Protocol):
    """When a row may leave. Implementations are frozen dataclasses that obey the six laws of docs/architecture.md."""

    needs: ClassVar[tuple[str, ...]]
    per_exit: ClassVar[tuple[str, ...]]

    @property
    def enabled(self) -> tuple[bool, ...] | None:
        """One flag per exit, or None when every exit is on. The last exit is always on."""
        ...

    def init(self, seen: Evidence) -> State:
        """The state before the first visited exit: tensors with one row per row of `seen`."""
        ...

    def step(self, k: int, seen: Evidence, state: State) -> Step:
        """What happens at exit k (0-based), given what exits before it left in `state`."""
        ...


def visits(policy: Policy, exits: int) -> tuple[int, ...]:
    """The exits that a driver visits, in order: those switched on, and always the last."""
    flags = policy.enabled
    return tuple(k for k in range(exits) if k == exits - 1 or flags is None or flags[k])


def check_exits(policy: Policy, exits: int) -> None:
    """Nothing, when every per-exit field of the policy has one entry per exit.

    Raises:
        ShapeError: a field is for another number of exits.
    """
    for name in policy.per_exit:
        value = getattr(policy, name)
        if isinstance(value, tuple) and len(value) != exits:
            raise ShapeError(
                f"{type(policy).__name__}.{name} has {len(value)} entries, but there are {exits} exits. "
                "Give one entry per exit (the last is not used by thresholds), or calibrate on a trace of this model."
            )


def check_signals(policy: Policy, signals: tuple[str, ...]) -> None:
    """Nothing, when every signal that the policy needs is among those of a model.

    Raises:
        ShapeError: one is missing.
    """
    if missing := [name for name in policy.needs if name not in signals]:
        has = f"only the signals {', '.join(signals)}" if signals else "logits only"
        raise ShapeError(
            f"{type(policy).__name__} needs the signals {', '.join(missing)}; the model has {has}. "
            "Give it what is missing, such as learn_certainty(model, data), or another policy."
        )


def at_exit(value: tuple[float, ...] | float, k: int) -> float:
    """Entry k of a per-exit field, or the one value that is repeated."""
    return value[k] if isinstance(value, tuple) else value


def fires(policy: Any, k: int, score: Float[Tensor, "batch"]) -> Bool[Tensor, "batch"]:
    """Where `score >= threshold` at exit k; nowhere when the exit is switched off, whatever the score."""
    if policy.enabled is not None and not policy.enabled[k]:
        return torch.zeros_like(score, dtype=torch.bool)
    return score >= at_exit(policy.thresholds, k)


def as_floats(value: Any, name: str) -> tuple[float, ...] | float:
    """A finite float, or a non-empty tuple of them, from a number or a sequence.

    Raises:
        ValueRangeError: something is not a number, or not finite.
    """
    scalar = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        entries = (value,) if scalar else tuple(value)
        if isinstance(value, str | bytes | dict) or any(isinstance(v, str | bytes | bool) for v in entries):
            raise TypeError(f"{name} holds something other than numbers")
        floats = tuple(float(v) for v in entries)
    except (TypeError, ValueError, OverflowError):
        raise ValueRangeError(f"{name} is {value!r}; expected a number or one number per exit.") from None
    if not floats or not all(math.isfinite(v) for v in floats):
        raise ValueRangeError(
            f"{name} is {value!r}; expected finite numbers. To switch an exit off, use enabled=(True, False, ...)."
        )
    return floats[0] if scalar else floats


def as_flags(value: Any) -> tuple[bool, ...] | None:
    """None, or a non-empty tuple of bools.

    Raises:
        ValueRangeError: an entry is not a bool.
    """
    if value is None:
        return None
    flags = tuple(value) if isinstance(value, list | tuple) else ()
    if not flags or not all(isinstance(v, bool) for v in flags):
        raise ValueRangeError(f"enabled is {value!r}; expected None or one True/False per exit.")
    return flags
