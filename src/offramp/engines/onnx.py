"""Stages in onnxruntime: one session for each visited exit with the policy's step inside, or one file for all."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from offramp.engines.base import Frozen, Visit
from offramp.errors import NotStageable, first_line
from offramp.inputs import Inputs
from offramp.model import ExitModel
from offramp.onnx.assemble import VisitGraph, cascade_of, parted, visits_of
from offramp.onnx.graphs import StageGraph, export_stages, export_steps, export_whole
from offramp.onnx.session import OnnxFile, about_options, cannot_answer, session_options, with_runtime
from offramp.policies.base import Policy, State, Step
from offramp.prediction import Prediction
from offramp.stages import Carry
from offramp.units import parts_of

__all__ = ["OnnxFileEngine", "OnnxStages"]


class OnnxStages(Frozen):
    """onnxruntime with one session for each visited exit: stages, head and the policy's step are in its graph, and
    rows are regrouped between sessions.

    With precision "int8" weights are int8 and activations are quantised row by row, so that a row's answer is what it
    would be alone. "int8-batch" is onnxruntime's dynamic kind, with one scale over the whole batch: a row's answer
    depends on its neighbours.
    """

    name: ClassVar[str] = "onnx"
    others: ClassVar[tuple[str, ...]] = ("int8", "int8-batch")

    def __init__(self, model: ExitModel, precision: str | None = None, threads: int | None = None) -> None:
        super().__init__(model, precision, threads)
        self._graphs: tuple[StageGraph, ...] | None = None
        self._stages = model.stages()
        parts = parts_of(model)
        self._names = [live.name for live in parts.pieces[0].enters]
        self._uncut = parts.uncut.enters
        self._whole: _Run | None = None
        self._says: list[_Run] = []
        self._alone: dict[tuple[str, Policy | None], _Run] = {}  # what `parts` and `stages_alone` time
        self._parted: list[tuple[Any, Any]] = []

    @classmethod
    def fits(cls, model: ExitModel) -> tuple[str, ...]:
        """The precisions that the engine has for a model."""
        with_runtime()
        found = super().fits(model)
        parts_of(model)
        return found

    @classmethod
    def settings(cls, model: ExitModel) -> str:
        """Precisions, threads, and how threads wait."""
        return f"{', '.join(cls.fits(model))}; {about_options(session_options())}"

    def graphs(self, progress: Callable[[], None] | None = None) -> tuple[StageGraph, ...]:
        """The graphs of the stages with their heads, in this precision; `progress` is called after every one."""
        if self._graphs is None:
            self._same()
            self._graphs = export_stages(self.model, progress)
            if self.precision != "fp32":
                from offramp.onnx.quantize import quantized

                self._graphs = quantized(self._graphs, self.precision)
        return self._graphs

    def bind(self, policy: Policy) -> Any:
        """The engine under a policy; its graphs are made here, which takes seconds."""
        self.check(policy)
        return _BoundVisits(self, visits_of(self.model, policy, self.graphs()))

    def session(self, proto: Any) -> "_Run":
        """What runs a graph."""
        return _Run(proto, self.threads)

    def start(self, inputs: Inputs) -> Carry:
        """The carry into the first stage."""
        return self._stages.start(inputs)

    def whole(self, inputs: Inputs) -> Float[Tensor, "batch cls"]:
        """The network's own logits, in one session of the same precision."""
        if self._whole is None:
            self._same()
            proto = export_whole(self.model)
            if self.precision != "fp32":
                from offramp.onnx.quantize import quantized_proto

                proto = quantized_proto(proto, self.precision)
            self._whole = self.session(proto)
        values = dict(zip(self._names, self.start(inputs).values, strict=True))
        feeds = {name: _array(values[live.name]) for name, live in zip(self._whole.inputs, self._uncut, strict=True)}
        return torch.from_numpy(self._whole(feeds)[0])

    def says(self, inputs: Inputs) -> tuple[Float[Tensor, "exit batch cls"], Float[Tensor, "exit batch sig"] | None]:
        """(the logits of every exit, their signals or None)."""
        if not self._says:
            self._says = [self.session(graph.proto) for graph in self.graphs()]
        values = [_array(value) for value in self.start(inputs).values]
        logits, signals = [], []
        for graph, run in zip(self.graphs(), self._says, strict=True):
            out = run(dict(zip(run.inputs, values, strict=True)))
            logits.append(torch.from_numpy(out[0]))
            if self.model.signals:
                none = np.zeros((len(out[0]), len(self.model.signals)), np.float32)
                signals.append(torch.from_numpy(out[1] if graph.signals else none))
            values = out[1 + graph.signals :]
        return torch.stack(logits), torch.stack(signals) if signals else None

    def parts(self, inputs: Inputs, policy: Policy) -> dict[str, Callable[[], object]]:
        """What `measure` times; stages, heads and steps are sessions of their own here."""
        self.check(policy)
        found: dict[str, Callable[[], object]] = {"whole": lambda: self.whole(inputs)}
        values: list[Any] = [_array(value) for value in self.start(inputs).values]
        steps = {step.k: step for step in export_steps(self.model, policy)}
        state: list[Any] = []
        for graph, (alone, head) in self._apart():
            out = self._timed(found, f"stage {graph.k}", alone, values)
            if head is None:
                break
            values, border = out[: len(graph.leaves)], dict(zip(_out_names(alone), out, strict=True))
            said = self._timed(found, f"head {graph.k}", head, [border[i.name] for i in head.graph.input])
            if graph.k in steps:
                step = steps[graph.k]
                given = [*said[: 1 + step.signals], *state]
                told = self._timed(found, f"step {graph.k}", step.proto, given, policy)
                state = told[2:]
        return found

    def stages_alone(self, inputs: Inputs, exits: Int64[Tensor, "batch"]) -> Callable[[], object]:
        """What runs the stages and nothing else, each on the rows that get there; every stage is a session."""
        carry: Any = self.start(inputs)
        found: dict[str, Callable[[], object]] = {}
        for graph, (alone, _) in self._apart():
            out = self._timed(found, f"stage {graph.k}", alone, [_array(value) for value in carry.values])
            on = exits > graph.k
            if not graph.leaves or not bool(on.any()):
                break
            values = tuple(torch.from_numpy(value) for value in out[: len(graph.leaves)])
            after = self._stages.after(graph.k, carry, values)
            carry, exits = after if bool(on.all()) else after.select(on), exits[on]
        return lambda: [call() for call in found.values()]

    def _apart(self) -> list[tuple[StageGraph, tuple[Any, Any]]]:
        """The stages, each with (itself without its head, its head alone)."""
        if not self._parted:
            self._parted = [parted(graph) for graph in self.graphs()]
        return list(zip(self.graphs(), self._parted, strict=True))

    def _timed(
        self, found: dict[str, Callable[[], object]], name: str, proto: Any, values: Sequence[Any],
        policy: Policy | None = None,
    ) -> list[Any]:  # fmt: skip
        """What a graph gives; its call is among what is timed. Sessions serve all batch sizes."""
        run = self._alone.get((name, policy)) or self._alone.setdefault((name, policy), self.session(proto))
        feeds = dict(zip(run.inputs, values, strict=True))
        found[name] = lambda: run(feeds)
        return run(feeds)


class OnnxFileEngine(OnnxStages):
    """onnxruntime with one file: stages, heads, policy and regrouping in one graph of nested `If`."""

    name: ClassVar[str] = "onnx-file"

    def bind(self, policy: Policy) -> Any:
        """The engine under a policy; its graph is made here, which takes seconds."""
        self.check(policy)
        return _BoundFile(cascade_of(self.model, policy, stages=self.graphs()), self.threads)


class _Run:
    """A session: arrays by name -> the outputs in their order."""

    def __init__(self, proto: Any, threads: int | None) -> None:
        ort = with_runtime()
        try:
            self._session = ort.InferenceSession(
                proto.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own kinds
            raise NotStageable(f"onnxruntime cannot run a stage: {first_line(error)}") from error
        self.inputs = tuple(i.name for i in self._session.get_inputs())
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._call = self._session.run

    def __call__(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return self._call(self._outputs, feeds)
        except Exception as error:  # onnxruntime's own kinds
            raise cannot_answer(error) from error


class _BoundVisits:
    """Sessions of a policy's visits."""

    def __init__(self, engine: OnnxStages, graphs: Sequence[VisitGraph]) -> None:
        self._stages, self._graphs, self.start = engine.model.stages(), graphs, engine.start
        self._runs = [engine.session(graph.proto) for graph in graphs]

    def visit(self, place: int, carry: Carry, state: State | None) -> Visit:
        """One session: stages up to a visited exit, head and step."""
        graph, values = self._graphs[place], carry.values
        given = [_array(value) for value in (*values, *(state or ()))]
        out = self._runs[place](dict(zip(graph.inputs, given, strict=True)))
        told = [torch.from_numpy(value) for value in out]
        if place == len(self._graphs) - 1:
            score, answer = told
            return Visit(Step(torch.ones_like(score, dtype=torch.bool), score, answer, ()), None)
        (stop, score, answer), rest = told[:3], told[3:]
        made = iter(rest[graph.states :])
        after = [next(made) if at is None else values[at] for at in graph.passed]
        step = Step(stop, score, answer, tuple(rest[: graph.states]))
        return Visit(step, self._stages.after(graph.k, carry, tuple(after)))


class _BoundFile:
    """One file under one policy."""

    def __init__(self, proto: Any, threads: int | None) -> None:
        self._run = OnnxFile(proto.SerializeToString(), threads=threads)

    def predict(self, inputs: Inputs) -> Prediction:
        """The answers in the order of the rows."""
        return self._run(inputs)


def _array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def _out_names(proto: Any) -> list[str]:
    """The names of a graph's outputs."""
    return [o.name for o in proto.graph.output]
