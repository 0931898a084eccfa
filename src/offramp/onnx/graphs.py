"""Stages with their heads, and the steps of a policy, as ONNX graphs: what a file is put together from."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offramp.cache import kept_file
from offramp.cut import Live, Piece
from offramp.errors import MissingExtra, NotStageable, first_line
from offramp.graph import three_rows
from offramp.inputs import names_of, tensors_of
from offramp.model import ExitModel
from offramp.policies import FAMILIES, dumps
from offramp.policies.base import Evidence, Policy, at_exit, visits
from offramp.units import StageUnit, UncutUnit, dims_of, fingerprint, parts_of, shapes_of

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "LARGEST", "OPSET", "StageGraph", "StepGraph", "export_stages", "export_steps", "export_whole", "with_onnx",
]  # fmt: skip

#: protobuf holds no more than 2 GiB; weights of larger models lie beside the file.
LARGEST = 1_900_000_000
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


def export_stages(model: ExitModel, progress: Callable[[], None] | None = None) -> tuple[StageGraph, ...]:
    """The graphs of a model's stages, whatever the policy. The model is in eval mode afterwards.

    Args:
        progress: called after every one; they take some seconds each.

    Raises:
        NotStageable: the model has no graph, or a part of it has no ONNX operators.
        MissingExtra: the packages onnx and onnxscript are not installed.
    """
    with_onnx()
    parts, key = parts_of(model), fingerprint(model)
    model.eval()
    found: list[StageGraph] = []
    for k, piece in enumerate(parts.pieces):

        def make(k: int = k, piece: Piece = piece) -> "ModelProto":
            with torch.no_grad():
                unit, at = StageUnit(model, k, piece, parts).eval(), _values(model, k)
                return _exported(unit, at, shapes_of(piece.enters, dims_of(parts)), f"stage {k}")

        signals = bool(model.signals) and k < model.exits - 1
        found.append(StageGraph(k, _kept(make, key, f"stage-{k}.onnx"), piece.enters, piece.leaves, signals))
        if progress is not None:
            progress()
    return tuple(found)


def export_whole(model: ExitModel) -> "ModelProto":
    """The graph of the whole network, without exits: its inputs by name -> logits [batch cls].

    Raises:
        NotStageable, MissingExtra: as for `export_stages`.
    """
    with_onnx()
    parts = parts_of(model)
    inputs = three_rows(model.example)
    named = dict(zip(names_of(inputs), tensors_of(inputs), strict=True))

    def make() -> "ModelProto":
        model.eval()
        given = tuple(named[live.name].clone() for live in parts.uncut.enters)
        unit = UncutUnit(parts.uncut, parts).eval()
        with torch.no_grad():
            return _exported(unit, given, shapes_of(parts.uncut.enters, dims_of(parts)), "the network")

    return _kept(make, fingerprint(model), "whole.onnx")


def _values(model: ExitModel, k: int) -> tuple[Any, ...]:
    """The carry into stage k of the example."""
    stages = model.stages()
    carry: Any = stages.start(three_rows(model.example))
    for before in range(k):
        _, carry = stages.run(before, carry)
    return tuple(value.clone() for value in carry.values)  # one tensor twice would become one input


def _kept(make: Callable[[], "ModelProto"], key: str | None, name: str) -> "ModelProto":
    """The graph, from the cache where it was exported before; large ones are not kept."""
    onnx = with_onnx()
    if key is None:
        return make()
    made: list[ModelProto] = []

    def write(path: Path) -> None:
        made.append(make())
        if made[0].ByteSize() >= LARGEST:
            raise _TooLarge
        path.write_bytes(made[0].SerializeToString())

    try:
        with_what = f"{OPSET} {torch.__version__} {onnx.__version__} {version('onnxscript')}"
        path = kept_file(name, f"{with_what} {key}", write)
    except (OSError, _TooLarge):  # a full or read-only disk costs time, no more
        return made[0] if made else make()
    return made[0] if made else onnx.load(str(path))


class _TooLarge(Exception):
    """A graph beyond what protobuf holds."""


def export_steps(model: ExitModel, policy: Policy) -> tuple[StepGraph, ...]:
    """The graphs of a policy's steps at the exits that it visits.

    Raises:
        NotStageable: a step has no ONNX operators, or stops otherwise than by `score >= thresholds`.
    """
    with_onnx()
    from torch.export import Dim

    columns = [model.signals.index(name) for name in policy.needs]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, model.classes, generator=generator)
    signals = torch.rand(3, len(model.signals), generator=generator) if columns else None
    batch, state = Dim("batch", min=1, max=2**31), ()
    found: list[StepGraph] = []
    ours = FAMILIES.get(type(policy).__name__) is type(policy)  # another one's code is not known
    key = f"{dumps(policy)} {model.exits} {model.classes} {model.signals}" if ours else None
    if not ours:
        _check_stops(policy, model.exits, model.classes, len(columns))
    for k in visits(policy, model.exits):
        last = k == model.exits - 1
        module = _Step(policy, k, columns, not found, last)
        given = (logits, *(() if signals is None or last else (signals,)), *state)

        def make(module: _Step = module, given: tuple[Tensor, ...] = given) -> "ModelProto":
            with torch.no_grad():
                return _exported(module, given, [{0: batch} for _ in given], f"the policy at exit {module.k}")

        with torch.no_grad():
            state = tuple(part.clone() for part in module(*given)[2:])  # one tensor twice would become one input
        found.append(StepGraph(k, _kept(make, key, f"step-{k}.onnx"), len(state), signals is not None and not last))
    return tuple(found)


def _check_stops(policy: Policy, exits: int, classes: int, signals: int) -> None:
    """Nothing, when a policy that is none of ours stops where its score is at least its threshold: that is what a graph
    does, whose thresholds can be given anew."""
    thresholds = getattr(policy, "thresholds", None)
    generator = torch.Generator().manual_seed(0)
    state: Any = None
    for k in visits(policy, exits)[:-1]:
        logits = 3 * torch.randn(256, classes, generator=generator)
        seen = Evidence(logits, torch.rand(256, signals, generator=generator) if signals else None)
        step = policy.step(k, seen, policy.init(seen) if state is None else state)
        state = step.state
        if thresholds is None or not torch.equal(step.stop, step.score >= at_exit(thresholds, k)):
            raise NotStageable(
                f"{type(policy).__name__} does not stop where its score is at least its threshold at exit {k}, which "
                "is what a graph does. Give it `thresholds`, and a score that says so; or use the engine eager."
            )


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


def _exported(module: nn.Module, given: Sequence[Any], shapes: Sequence[Any], what: str) -> "ModelProto":
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                module, tuple(given), dynamo=True, dynamic_shapes=(tuple(shapes),), opset_version=OPSET, optimize=True,
                verbose=False,
            )  # fmt: skip
    except Exception as error:  # the exporter raises many kinds
        raise NotStageable(f"{what} cannot be written as ONNX: {first_line(error, 300)}") from error
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
