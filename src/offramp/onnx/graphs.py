"""Stages with their heads, and the steps of a policy, as ONNX graphs: what a file is put together from."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offramp.cut import Live, Piece
from offramp.errors import MissingExtra, NotStageable
from offramp.graph import three_rows
from offramp.model import ExitModel
from offramp.policies.base import Evidence, Policy, visits
from offramp.sizes import compile_sizes
from offramp.stages import Parts

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["OPSET", "StageGraph", "StepGraph", "export_stages", "export_steps", "parts_of", "with_onnx"]

#: The operator set of what is written; onnxruntime 1.17 and later read it, in Python, Node and the browser.
OPSET = 20


@dataclass(frozen=True, eq=False)
class StageGraph:
    """One stage and its head: carry -> logits, signals where heads have some, carry.

    Args:
        k: the exit at its end. The last stage gives the model's own logits and nothing else.
        proto: the graph.
        enters, leaves: the carry, in the order of the graph's inputs and outputs.
        signals: whether the second output are signals.
    """

    k: int
    proto: "ModelProto"
    enters: tuple[Live, ...]
    leaves: tuple[Live, ...]
    signals: bool


@dataclass(frozen=True, eq=False)
class StepGraph:
    """The policy's step at one visited exit: logits, signals where it needs some, state -> score, answer, state.

    Args:
        k: the exit.
        proto: the graph.
        states: how many tensors the state that it gives has.
        signals: whether the second input are signals.
    """

    k: int
    proto: "ModelProto"
    states: int
    signals: bool


class _Stage(nn.Module):
    """A stage and its head, the numbers that it needs read off the carry."""

    def __init__(self, model: ExitModel, k: int, piece: Piece, parts: Parts) -> None:
        super().__init__()
        self.k, self.stage, self._model = k, piece.module, (model,)  # a tuple: not all of its weights are ours
        self.last = k == model.exits - 1
        self.head = None if self.last else model.heads[k]  # so that its weights are this module's own
        self.sizes = compile_sizes(piece.sizes, len(parts.ranges))
        self.where = _lengths(piece.enters, len(parts.ranges))
        names = [leaf.name for leaf in piece.leaves]
        self.mask = names.index(parts.mask) if parts.mask in names else None

    def forward(self, *carry: Tensor) -> tuple[Tensor, ...]:
        numbers = [0 if at is None else carry[at[0]].shape[at[1]] for at in self.where]
        out = self.stage(*carry, *self.sizes(*numbers))
        if self.last:
            return (out.float(),)
        tap, after = out[0], out[1:]
        logits, signals = self._model[0].evidence(self.k, tap, None if self.mask is None else after[self.mask])
        return (logits.float(), *(() if signals is None else (signals,)), *after)


class _Step(nn.Module):
    """A policy's step."""

    def __init__(self, policy: Policy, k: int, columns: Sequence[int], first: bool, last: bool) -> None:
        super().__init__()
        self.policy, self.k, self.columns, self.first, self.last = policy, k, list(columns), first, last

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        logits, rest, signals = given[0], given[1:], None
        if self.columns and self.last:
            signals = logits.new_zeros(logits.shape[0], len(self.columns))
        elif self.columns:
            signals, rest = rest[0][:, self.columns], rest[1:]
        seen = Evidence(logits, signals)
        step = self.policy.step(self.k, seen, self.policy.init(seen) if self.first else rest)
        return (step.score.float(), step.answer.float(), *(() if self.last else step.state))


def parts_of(model: ExitModel) -> Parts:
    """What the model was cut into.

    Raises:
        NotStageable: its stages were given by hand, so there is no graph.
    """
    parts = model.stages().parts
    if parts is None:
        raise NotStageable("the model's stages were given by hand; ONNX needs the graph of a model that Offramp cuts.")
    return parts


def export_stages(model: ExitModel, progress: Callable[[], None] | None = None) -> tuple[StageGraph, ...]:
    """The graphs of a model's stages, whatever the policy. The model is in eval mode afterwards.

    Args:
        progress: called after every one; they take some seconds each.

    Raises:
        NotStageable: the model has no graph, or a part of it has no ONNX operators.
        MissingExtra: the packages onnx and onnxscript are not installed.
    """
    with_onnx()
    from torch.export import Dim  # which loads the compiler

    parts = parts_of(model)
    found: list[StageGraph] = []
    dims = _dims(parts)
    model.eval()
    values: tuple[Any, ...] = model.stages().start(three_rows(model.example)).values
    for k, piece in enumerate(parts.pieces):
        module = _Stage(model, k, piece, parts).eval()
        shapes = [
            {axis: dims.get(word, Dim.AUTO) for axis, word in enumerate(live.shape) if not word.isdigit()}
            for live in piece.enters
        ]
        with torch.no_grad():
            proto = _exported(module, values, shapes, f"stage {k}")
            values = tuple(value.clone() for value in module(*values))  # one tensor twice would become one input
        signals = bool(model.signals) and k < model.exits - 1
        values = values[1 + signals :]
        found.append(StageGraph(k, proto, piece.enters, piece.leaves, signals))
        if progress is not None:
            progress()
    return tuple(found)


def export_steps(model: ExitModel, policy: Policy) -> tuple[StepGraph, ...]:
    """The graphs of a policy's steps at the exits that it visits.

    Raises:
        NotStageable: a step has no ONNX operators.
    """
    with_onnx()
    from torch.export import Dim

    columns = [model.signals.index(name) for name in policy.needs]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, model.classes, generator=generator)
    signals = torch.rand(3, len(model.signals), generator=generator) if columns else None
    batch, state = Dim("batch", min=1, max=2**31), ()
    found: list[StepGraph] = []
    for k in visits(policy, model.exits):
        last = k == model.exits - 1
        module = _Step(policy, k, columns, not found, last)
        given = (logits, *(() if signals is None or last else (signals,)), *state)
        with torch.no_grad():
            proto = _exported(module, given, [{0: batch} for _ in given], f"the policy at exit {k}")
            state = tuple(part.clone() for part in module(*given)[2:])  # one tensor twice would become one input
        found.append(StepGraph(k, proto, len(state), signals is not None and not last))
    return tuple(found)


def with_onnx() -> Any:
    """The module `onnx`.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra(f"exporting to ONNX needs {error.name}: pip install 'offramp[onnx]'.") from None
    return onnx


def _lengths(enters: Sequence[Live], symbols: int) -> list[tuple[int, int] | None]:
    """For each symbol the value and the axis that has its length, None where none has."""
    words = ["batch", *(f"n{i}" for i in range(1, symbols))]
    places = [(i, axis, word) for i, live in enumerate(enters) for axis, word in enumerate(live.shape)]
    return [next(((i, axis) for i, axis, word in places if word == wanted), None) for wanted in words]


def _dims(parts: Parts) -> dict[str, Any]:
    from torch.export import Dim

    words = ["batch", *(f"n{i}" for i in range(1, len(parts.ranges)))]
    return {
        word: Dim(word, min=least, max=min(most, 2**31))
        for word, (least, most) in zip(words, parts.ranges, strict=True)
    }


def _exported(module: nn.Module, given: Sequence[Any], shapes: Sequence[Any], what: str) -> "ModelProto":
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                module, tuple(given), dynamo=True, dynamic_shapes=(tuple(shapes),), opset_version=OPSET, optimize=True,
                verbose=False,
            )  # fmt: skip
    except Exception as error:  # the exporter raises many kinds
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise NotStageable(f"{what} cannot be written as ONNX: {told[0][:300]}") from error
    return program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter without its progress, its warnings, and its words on packages that are not there."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
