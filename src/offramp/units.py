"""Stages and heads as modules of tensors alone, which is what exporters take, and what a model is told apart by."""

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.cut import Live, Piece
from offramp.errors import NotStageable
from offramp.model import ExitModel
from offramp.sizes import compile_sizes
from offramp.stages import Parts

__all__ = ["HeadUnit", "StageUnit", "UncutUnit", "dims_of", "fingerprint", "parts_of", "precision_of", "shapes_of"]

#: The names of precisions that a model may have of itself.
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def parts_of(model: ExitModel) -> Parts:
    """What the model was cut into.

    Raises:
        NotStageable: its stages were given by hand, so there is no graph.
    """
    parts = model.stages().parts
    if parts is None:
        raise NotStageable(
            "the model's stages were given by hand; this needs the graph of a model that Offramp cuts. "
            "Attach without stages=, or use the engine eager."
        )
    return parts


def precision_of(model: nn.Module) -> str:
    """The precision of a model's weights."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))


class _Unit(nn.Module):
    """A piece, the numbers that it needs read off the carry."""

    def __init__(self, piece: Piece, parts: Parts) -> None:
        super().__init__()
        self.stage = piece.module
        self.sizes = compile_sizes(piece.sizes, len(parts.ranges))
        self.where = _lengths(piece.enters, len(parts.ranges))

    def _call(self, carry: Sequence[Tensor]) -> Any:
        numbers = [0 if at is None else carry[at[0]].shape[at[1]] for at in self.where]
        return self.stage(*carry, *self.sizes(*numbers))


class UncutUnit(_Unit):
    """The whole network, or one stage without its head: carry -> what the piece gives, as a tuple."""

    def forward(self, *carry: Tensor) -> tuple[Tensor, ...]:
        """Logits [batch cls], or the tap and the carry."""
        out = self._call(carry)
        return tuple(out) if isinstance(out, tuple | list) else (out.float(),)


class StageUnit(_Unit):
    """A stage and its head: carry -> logits as float32, signals where heads have some, carry."""

    def __init__(self, model: ExitModel, k: int, piece: Piece, parts: Parts) -> None:
        super().__init__(piece, parts)
        self.k, self._model = k, (model,)  # a tuple: not all of its weights are ours
        self.last = k == model.exits - 1
        self.head = None if self.last else model.heads[k]  # so that its weights are this module's own
        self.mask = _mask_place(piece, parts)

    def forward(self, *carry: Tensor) -> tuple[Tensor, ...]:
        """The last stage gives the model's own logits and nothing else."""
        out = self._call(carry)
        if self.last:
            return (out.float(),)
        tap, after = out[0], out[1:]
        logits, signals = self._model[0].evidence(self.k, tap, None if self.mask is None else after[self.mask])
        return (logits.float(), *(() if signals is None else (signals,)), *after)


class HeadUnit(nn.Module):
    """A head alone: tap, and the mask where it takes one -> logits as float32, signals where there are some."""

    def __init__(self, model: ExitModel, k: int) -> None:
        super().__init__()
        self.k, self._model, self.head = k, (model,), model.heads[k]

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Logits [batch cls] and signals [batch sig]."""
        logits, signals = self._model[0].evidence(self.k, given[0], given[1] if len(given) > 1 else None)
        return (logits.float(),) if signals is None else (logits.float(), signals)


def _mask_place(piece: Piece, parts: Parts) -> int | None:
    """Where the mask is among what goes on behind a piece, or None."""
    names = [leaf.name for leaf in piece.leaves]
    return names.index(parts.mask) if parts.mask in names else None


def dims_of(parts: Parts) -> dict[str, Any]:
    """The axes that vary, by their names in `Live.shape`, for `torch.export`."""
    from torch.export import Dim  # which loads the compiler

    words = ["batch", *(f"n{i}" for i in range(1, len(parts.ranges)))]
    return {
        word: Dim(word, min=least, max=min(most, 2**31))
        for word, (least, most) in zip(words, parts.ranges, strict=True)
    }


def shapes_of(enters: Sequence[Live], dims: dict[str, Any]) -> list[dict[int, Any]]:
    """Which axes of what enters a piece vary, for `torch.export`."""
    from torch.export import Dim

    return [
        {axis: dims.get(word, Dim.AUTO) for axis, word in enumerate(live.shape) if not word.isdigit()}
        for live in enters
    ]


def _lengths(enters: Sequence[Live], symbols: int) -> list[tuple[int, int] | None]:
    """For each symbol the value and the axis that has its length, None where none has."""
    words = ["batch", *(f"n{i}" for i in range(1, symbols))]
    places = [(i, axis, word) for i, live in enumerate(enters) for axis, word in enumerate(live.shape)]
    return [next(((i, axis) for i, axis, word in places if word == wanted), None) for wanted in words]


def fingerprint(model: ExitModel) -> str | None:
    """What tells a model from others: its graphs, its heads' code and every weight; None where heads' code is unknown.

    Two models of one fingerprint answer alike with the same version of torch.
    """
    parts, digest = parts_of(model), hashlib.sha256()
    pieces = [*parts.pieces, parts.uncut]
    told: list[Any] = [torch.__version__, parts.names, parts.axes, parts.dtypes, parts.ranges, parts.mask]
    told += [model.classes, model.signals]
    for piece in pieces:
        told += [piece.module.code, piece.enters, piece.leaves, piece.sizes]
    try:
        told += [_code(module) for head in model.heads for module in head.modules()]
    except (OSError, TypeError):  # a class that was typed into a console has no source
        return None
    digest.update(repr(told).encode())
    seen: set[int] = set()
    for module in (*(piece.module for piece in pieces), *model.heads):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {id(tensor) in seen}".encode())
            if id(tensor) not in seen:
                seen.add(id(tensor))
                digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy() if tensor.numel() else b""


def _code(module: nn.Module) -> str:
    """What a module computes, as far as its source, its settings and its parts say."""
    kind = type(module)
    code = getattr(module, "code", None)  # of a graph
    known = kind.__module__.startswith(("torch.nn.", "torch.ao."))
    source = code if isinstance(code, str) else "" if known else inspect.getsource(kind)
    plain = {
        key: value for key, value in sorted(vars(module).items())
        if key != "training" and isinstance(value, bool | int | float | str | tuple | list | None)
    }  # fmt: skip
    return f"{kind.__module__}.{kind.__qualname__} {module.extra_repr()} {plain!r} {source}"
