"""What runs the stages of a model: an engine, and an engine under one policy."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from offramp.errors import NotStageable, ShapeError, ValueRangeError
from offramp.inputs import Inputs, tensors_of
from offramp.model import ExitModel
from offramp.policies.base import Evidence, Policy, State, Step, check_exits, check_signals, visits
from offramp.prediction import Prediction
from offramp.stages import Carry
from offramp.units import fingerprint, precision_of

#: What keeps threads from taking the cores from others; OpenMP reads it when it is loaded.
BESIDE = " (beside other work, set OMP_WAIT_POLICY=PASSIVE before Python starts)"

__all__ = ["Bound", "Engine", "Frozen", "Staged", "Visit", "WholeRun"]


class Visit(NamedTuple):
    """What came of one visited exit: the step, and the carry that goes on; None behind the last exit."""

    step: Step
    carry: Carry | None


@runtime_checkable
class Bound(Protocol):
    """An engine under one policy: visits come one after the other, and rows may leave in between."""

    def start(self, inputs: Inputs) -> Carry:
        """The carry into the first stage."""
        ...

    def visit(self, place: int, carry: Carry, state: State | None) -> Visit:
        """The stages up to the policy's visit number `place`, the head there, and the policy's step."""
        ...


@runtime_checkable
class WholeRun(Protocol):
    """An engine under one policy that takes a batch from the start to the end by itself."""

    def predict(self, inputs: Inputs) -> Prediction:
        """The answers in the order of the rows."""
        ...


class Engine(ABC):
    """How the stages of one model run, whatever the policy. It holds the model's weights as they were when it was made,
    except for "eager", which sees changes. Making one leaves the model in eval mode.

    Attributes:
        name: what it is called.
        own: precisions that a model may have of itself.
        others: what a model in fp32 can be run in besides.
        devices: where it runs.
        model, precision, threads: what this one was made for; `threads` is None where torch's own number counts.

    Raises:
        ShapeError: the model is none with exits.
        ValueRangeError: the engine does not have the precision, or does not run where the model is.
    """

    name: ClassVar[str] = ""
    own: ClassVar[tuple[str, ...]] = ("fp32",)
    others: ClassVar[tuple[str, ...]] = ()
    devices: ClassVar[tuple[str, ...]] = ("cpu",)

    def __init__(self, model: ExitModel, precision: str | None = None, threads: int | None = None) -> None:
        if not isinstance(model, ExitModel):
            raise ShapeError(f"the model is {type(model).__name__}; expected what attach(...) returned.")
        fits = self.fits(model)
        if precision is not None and precision not in fits:
            raise ValueRangeError(
                f"precision is {precision!r}; the engine {self.name} has {', '.join(fits)} for this model."
            )
        if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
            raise ValueRangeError(f"threads is {threads!r}; expected a whole number, at least 1.")
        self.model = model
        self.precision = precision or fits[0]
        self.threads = threads

    @classmethod
    def fits(cls, model: ExitModel) -> tuple[str, ...]:
        """The precisions that the engine has for a model, its own first.

        Raises:
            ValueRangeError: it takes no models of that precision, or does not run where the model is.
            NotStageable: it needs a graph, and the model has none.
        """
        own, device = precision_of(model), tensors_of(model.example)[0].device.type
        if own not in cls.own:
            raise ValueRangeError(f"the engine {cls.name} takes models in {', '.join(cls.own)}; this one is in {own}.")
        if device not in cls.devices and "any" not in cls.devices:
            raise ValueRangeError(
                f"the engine {cls.name} runs on {', '.join(cls.devices)}; the model is on {device}. Move the model."
            )
        return (own, *(each for each in cls.others if each != own)) if own == "fp32" else (own,)

    @classmethod
    def settings(cls, model: ExitModel) -> str:
        """What a reader should know before it is used: precisions, threads, and how threads wait."""
        wait = os.environ.get("OMP_WAIT_POLICY", "active")
        return (
            f"{', '.join(cls.fits(model))}; {torch.get_num_threads()} threads of OpenMP, which wait {wait.lower()}"
            f"{'' if wait.lower() == 'passive' else BESIDE}"
        )

    def check(self, policy: Policy) -> None:
        """Nothing, when the policy fits the model.

        Raises:
            ShapeError: it is none, is for another number of exits, or needs signals that the model does not have.
        """
        if isinstance(policy, type) or not isinstance(policy, Policy):
            raise ShapeError(f"the policy is {policy!r}; expected a value such as MaxProb(0.9).")
        check_exits(policy, self.model.exits)
        check_signals(policy, self.model.signals)

    @abstractmethod
    def bind(self, policy: Policy) -> "Bound | WholeRun":
        """The engine under a policy."""

    @abstractmethod
    def whole(self, inputs: Inputs) -> Float[Tensor, "batch cls"]:
        """The network's own logits, without exits: what speed is compared with."""

    @abstractmethod
    def says(self, inputs: Inputs) -> tuple[Float[Tensor, "exit batch cls"], Float[Tensor, "exit batch sig"] | None]:
        """(the logits of every exit, their signals or None), in this engine's arithmetic: what `record` writes down."""

    @abstractmethod
    def parts(self, inputs: Inputs, policy: Policy) -> dict[str, Callable[[], object]]:
        """What `measure` times on these inputs: "whole", "stage k", "head k" and "step k" for every exit but the last.
        A head may include the policy's step, which then has no entry of its own. What a call gives is not used; it has
        come when the call is done, but for what a device does behind the host."""

    @abstractmethod
    def stages_alone(self, inputs: Inputs, exits: Int64[Tensor, "batch"]) -> Callable[[], object]:
        """What runs the stages and nothing else, each on the rows that get there when every row leaves at its exit in
        `exits`: no head, no step, no regrouping. What exits could save at best."""

    def about(self) -> dict[str, Any]:
        """What a reader should know: name, precision, threads."""
        return {"engine": self.name, "precision": self.precision, "threads": self.threads or torch.get_num_threads()}


class Frozen(Engine):
    """An engine that keeps the weights that the model had when it was made."""

    def __init__(self, model: ExitModel, precision: str | None = None, threads: int | None = None) -> None:
        super().__init__(model, precision, threads)
        self._key = fingerprint(model)

    def _same(self) -> None:
        """Nothing, when the model is what it was when the engine was made: what is made later must fit what is there.

        Raises:
            NotStageable: its weights or its heads were changed.
        """
        if fingerprint(self.model) != self._key:
            raise NotStageable(
                f"the model was changed after the engine {self.name} was made, which keeps the weights of then. "
                "Make the engine, or the Runtime, again."
            )


class Staged(Engine):
    """An engine whose stages give taps, heads their evidence, and torch the policy's steps."""

    @abstractmethod
    def start(self, inputs: Inputs) -> Carry:
        """The carry into the first stage."""

    @abstractmethod
    def run(self, k: int, carry: Carry) -> tuple[Tensor, Carry | None]:
        """Stage k: the tap [batch ...], as the model's module gives it, and what goes on; behind the last stage the
        logits [batch cls] and None."""

    @abstractmethod
    def head(self, k: int, tap: Tensor, carry: Carry, signals: bool) -> tuple[Tensor, Tensor | None]:
        """Exit k's logits [batch cls], and its signals [batch sig] where they are asked for and it has some; `carry` is
        what goes on there, with the mask of its rows."""

    def bind(self, policy: Policy) -> Bound:
        """The engine under a policy."""
        return _BoundStages(self, policy)

    def says(self, inputs: Inputs) -> tuple[Float[Tensor, "exit batch cls"], Float[Tensor, "exit batch sig"] | None]:
        """(the logits of every exit, their signals or None)."""
        carry: Any = self.start(inputs)
        logits, signals = [], []
        for k in range(self.model.exits):
            tap, carry = self.run(k, carry)
            said, told = (tap, None) if carry is None else self.head(k, tap, carry, True)
            logits.append(said.float())
            if self.model.signals:
                signals.append(said.new_zeros(len(said), len(self.model.signals)) if told is None else told)
        return torch.stack(logits), torch.stack(signals) if signals else None

    def stages_alone(self, inputs: Inputs, exits: Int64[Tensor, "batch"]) -> Callable[[], object]:
        """What runs the stages and nothing else, each on the rows that get there."""
        carry: Any = self.start(inputs)
        calls: list[Callable[[], object]] = []
        for k in range(self.model.exits):
            calls.append(partial(self.run, k, carry))
            _, after = self.run(k, carry)
            on = exits > k
            if after is None or not bool(on.any()):
                break
            carry, exits = after if bool(on.all()) else after.select(on), exits[on]
        return lambda: [call() for call in calls]

    def parts(self, inputs: Inputs, policy: Policy) -> dict[str, Callable[[], object]]:
        """What `measure` times."""
        found: dict[str, Callable[[], object]] = {"whole": lambda: self.whole(inputs)}
        carry, state = self.start(inputs), None
        for k in range(self.model.exits):
            found[f"stage {k}"] = partial(self.run, k, carry)
            tap, after = self.run(k, carry)
            if after is None:
                break
            found[f"head {k}"] = partial(self.head, k, tap, after, bool(policy.needs))
            seen = _picked(policy, self.model.signals, *self.head(k, tap, after, bool(policy.needs)))
            known = policy.init(seen) if state is None else state
            found[f"step {k}"] = partial(_decided, policy, k, seen, known)
            carry, state = after, policy.step(k, seen, known).state
        return found


class _BoundStages:
    """Stages of an engine under a policy."""

    def __init__(self, engine: Staged, policy: Policy) -> None:
        self.engine, self.policy = engine, policy
        self.visits = visits(policy, engine.model.exits)
        self.signals = bool(policy.needs)
        self.spans = [
            range(start, k) for start, k in zip((0, *(k + 1 for k in self.visits)), self.visits, strict=False)
        ]
        self.start = engine.start

    def visit(self, place: int, carry: Carry, state: State | None) -> Visit:
        """The stages up to a visited exit, the head there, and the policy's step."""
        engine, policy, k = self.engine, self.policy, self.visits[place]
        after: Carry | None
        for before in self.spans[place]:
            _, after = engine.run(before, carry)
            carry = after  # type: ignore[assignment]
        tap, after = engine.run(k, carry)
        if after is None:  # the last exit: what ends there are the model's own logits
            seen = Evidence(tap.float(), tap.new_zeros(len(tap), len(policy.needs)) if policy.needs else None)
        else:
            seen = _picked(policy, engine.model.signals, *engine.head(k, tap, after, self.signals))
        return Visit(policy.step(k, seen, policy.init(seen) if state is None else state), after)


def _decided(policy: Policy, k: int, seen: Evidence, state: State) -> int:
    """How many rows stop, which a runtime waits for."""
    return int(policy.step(k, seen, state).stop.sum())


def _picked(policy: Policy, names: tuple[str, ...], logits: Tensor, signals: Tensor | None) -> Evidence:
    """The evidence of an exit, with the signals that the policy needs in its order."""
    if not policy.needs or signals is None:
        return Evidence(logits.float())
    if policy.needs != names:
        signals = signals[:, [names.index(name) for name in policy.needs]]
    return Evidence(logits.float(), signals)
