"""Stages and heads compiled ahead of time by inductor, each once for every batch size."""

import contextlib
import io
import logging
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from offramp.cache import kept_file
from offramp.engines.base import Frozen, Staged
from offramp.engines.lower import lowered
from offramp.errors import MissingExtra, NotStageable, ShapeError, ValueRangeError, first_line
from offramp.graph import three_rows
from offramp.inputs import Inputs, names_of, tensors_of
from offramp.machine import processor
from offramp.model import ExitModel
from offramp.stages import Carry, stages_of_parts
from offramp.units import HeadUnit, UncutUnit, dims_of, parts_of, precision_of, shapes_of

__all__ = ["Compiled"]


class Compiled(Frozen, Staged):
    """Stages and heads as machine code: compiled once with a dynamic batch and dynamic lengths, so that no batch size
    compiles anything again, and kept in the cache for the next process. The policy's steps are torch's.

    Compiling takes some ten seconds for a stage, and needs a C++ compiler; reading from the cache takes milliseconds.
    The code is made for this processor, so it is no part of a bundle.
    """

    name: ClassVar[str] = "compiled"
    own: ClassVar[tuple[str, ...]] = ("fp32", "bf16")
    others: ClassVar[tuple[str, ...]] = ("bf16",)
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    def __init__(
        self,
        model: ExitModel,
        precision: str | None = None,
        threads: int | None = None,
        progress: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(model, precision, threads)
        if threads is not None:
            torch.set_num_threads(threads)
        self._autocast = self.precision == "bf16" != precision_of(model)
        self._kind = tensors_of(model.example)[0].device.type
        self._parts = parts_of(model)
        if self._autocast:
            self._parts = lowered(self._parts)
        self._stages = stages_of_parts(self._parts)
        self._names = [live.name for live in self._parts.pieces[0].enters]
        self._uncut: Any = None
        model.eval()
        self._calls: list[Any] = []
        self._heads: list[Any] = []
        example = self._stages.start(three_rows(model.example))
        carry: Any = example
        dims = dims_of(self._parts)
        for k, piece in enumerate(self._parts.pieces):
            unit, shapes = UncutUnit(piece, self._parts), shapes_of(piece.enters, dims)
            self._calls.append(self._compiled(unit, carry.values, shapes, f"stage-{k}"))
            with torch.no_grad(), self._precise():
                tap, carry = self._stages.run(k, carry)
            if carry is not None:
                self._heads.append(self._head(k, tap, carry.mask, piece.tap, dims))
            if progress is not None:
                progress()

    @classmethod
    def fits(cls, model: ExitModel) -> tuple[str, ...]:
        """The precisions that the engine has for a model."""
        found = super().fits(model)
        parts_of(model)
        if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
            raise MissingExtra("the engine compiled needs a C++ compiler (g++ or clang++); none is on the PATH.")
        return found

    def _head(self, k: int, tap: Tensor, mask: Tensor | None, words: Sequence[str], dims: dict[str, Any]) -> Any:
        """(what computes head k, whether it takes the mask)."""
        from torch.export import Dim

        takes = bool(getattr(self.model.heads[k], "takes_mask", False)) and mask is not None
        free = {axis: dims.get(word, Dim.AUTO) for axis, word in enumerate(words) if not word.isdigit()}
        shapes = [free, *([{0: dims["batch"], 1: Dim.AUTO}] if takes else [])]
        given = (tap, mask) if takes else (tap,)
        return self._compiled(HeadUnit(self.model, k), given, shapes, f"head-{k}"), takes

    def _compiled(self, unit: nn.Module, values: Sequence[Any], shapes: Sequence[Any], name: str) -> Any:
        """What computes a unit, from the cache where it was compiled before."""
        # one tensor twice would become one input; and the code counts on dense rows, as `run` gives them
        given = tuple(value.detach().clone(memory_format=torch.contiguous_format) for value in values)

        def make(path: Path) -> None:
            _compile(_Lowered(unit, self._kind).eval() if self._autocast else unit.eval(), given, shapes, path, name)

        device = given[0].device
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        # inductor writes the number of threads into its loops
        key = f"aoti {kind} {platform.machine()} {torch.get_num_threads()} {self.precision} {self._key}"
        load = import_module("torch._inductor").aoti_load_package  # which takes a second to import
        if self._key is not None:
            with contextlib.suppress(OSError):  # a full or read-only disk costs time, no more
                return load(str(kept_file(f"{name}.pt2", key, make)))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.pt2"
            make(path)
            return load(str(path))

    def _precise(self) -> Any:
        if not self._autocast:
            return contextlib.nullcontext()
        return torch.autocast(self._kind, torch.bfloat16)

    def start(self, inputs: Inputs) -> Carry:
        """The carry into the first stage."""
        for tensor in tensors_of(inputs):
            if tensor.device.type != self._kind:  # the code reads memory without asking whose it is
                raise ShapeError(f"an input is on {tensor.device}; the model was compiled on {self._kind}. Move it.")
        return self._stages.start(inputs)

    def run(self, k: int, carry: Carry) -> tuple[Tensor, Carry | None]:
        """Stage k: the tap and what goes on; the logits and None behind the last."""
        try:
            out = self._calls[k](*[value.contiguous() for value in carry.values])
        except RuntimeError as error:
            if "out of bounds" not in str(error):
                raise
            raise ValueRangeError(f"an input has numbers beyond a table's size: {first_line(error)}.") from error
        if k == len(self._calls) - 1:
            return out[0], None
        return out[0], self._stages.after(k, carry, tuple(out[1:]))

    def head(self, k: int, tap: Tensor, carry: Carry, signals: bool) -> tuple[Tensor, Tensor | None]:
        """Exit k's logits and signals; one piece of code computes both."""
        call, takes = self._heads[k]
        tap = tap.contiguous()
        out = call(tap, carry.mask.contiguous()) if takes else call(tap)  # type: ignore[union-attr]
        return out[0], out[1] if len(out) > 1 else None

    def whole(self, inputs: Inputs) -> Float[Tensor, "batch cls"]:
        """The network's own logits, compiled as one piece when this is first asked for."""
        parts = self._parts
        if self._uncut is None:
            self._same()
            example = three_rows(self.model.example)
            named = dict(zip(names_of(example), tensors_of(example), strict=True))
            given = tuple(named[live.name] for live in parts.uncut.enters)
            shapes = shapes_of(parts.uncut.enters, dims_of(parts))
            self._uncut = self._compiled(UncutUnit(parts.uncut, parts), given, shapes, "whole")
        values = dict(zip(self._names, self.start(inputs).values, strict=True))
        return self._uncut(*(values[live.name].contiguous() for live in parts.uncut.enters))[0]


class _Lowered(nn.Module):
    """A unit whose products run in bf16."""

    def __init__(self, unit: nn.Module, kind: str) -> None:
        super().__init__()
        self.unit, self.kind = unit, kind

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(self.kind, torch.bfloat16):
            return self.unit(*given)


def _compile(unit: nn.Module, given: tuple[Tensor, ...], shapes: Sequence[Any], path: Path, name: str) -> None:
    """Nothing; the unit's machine code is in the file."""
    compiler = import_module("torch._inductor")
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(unit, given, dynamic_shapes=(tuple(shapes),))
            target = path.with_suffix(".pt2")  # inductor asks for that ending
            compiler.aoti_compile_and_package(program, package_path=str(target))
            if target != path:
                target.replace(path)
    except Exception as error:  # the compiler raises many kinds
        raise NotStageable(
            f"{name} cannot be compiled: {first_line(error, 300)}. A C++ compiler is needed (g++ or clang); "
            "the engine eager needs none."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The compiler without its words on standard output and its warnings."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
