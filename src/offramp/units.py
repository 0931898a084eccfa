"""Stages and heads as modules of tensors alone, which is what exporters take, and what a model is told apart by."""

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from offramp.cut import Live, Piece
from offramp.errors import NotStageable
from offramp.graph import eval_mode, three_rows
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
    """What tells a model from others: its graphs, what its heads compute, and every weight; None where a head cannot be
    exported.

    Two models of one fingerprint answer alike with the same version of torch.
    """
    parts, digest = parts_of(model), hashlib.sha256()
    pieces = [*parts.pieces, parts.uncut]
    told: list[Any] = [torch.__version__, parts.names, parts.axes, parts.dtypes, parts.ranges, parts.mask]
    told += [model.classes, model.signals]
    for piece in pieces:
        graphs = [module.code for module in piece.module.modules() if isinstance(module, fx.GraphModule)]
        told += [graphs, piece.enters, piece.leaves, piece.sizes]
    modules: list[Any] = [*(piece.module for piece in pieces), *model.heads]
    for k, head in enumerate(model.heads):
        if all(map(_is_known, head.modules())):
            told += [_settings(module) for module in head.modules()]
            continue
        program = _program(model, k)  # its code, and tensors that are no parameters, may be anywhere
        if program is None:
            return None
        code, rest = program
        told.append(code)
        modules.append(rest)
    digest.update(repr(told).encode())
    seen: set[int] = set()
    for module in modules:
        named = module.items() if isinstance(module, dict) else (*module.named_parameters(), *module.named_buffers())
        for name, tensor in named:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {id(tensor) in seen}".encode())
            if id(tensor) not in seen:
                seen.add(id(tensor))
                digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy() if tensor.numel() else b""


#: What every module has; hooks change what it computes.
INSIDE = frozenset(vars(nn.Module()))
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _is_known(module: nn.Module) -> bool:
    """Whether the class and the settings say all of what a module computes: one of torch's or of ours."""
    plain = all(_is_plain(value) for key, value in vars(module).items() if key not in INSIDE)
    return (
        type(module).__module__.startswith(("torch.nn.modules.", "offramp."))
        and plain
        and not any(getattr(module, name) for name in HOOKS)
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | None)


def _settings(module: nn.Module) -> str:
    settings = {key: value for key, value in sorted(vars(module).items()) if key not in INSIDE}
    return f"{type(module).__module__}.{type(module).__qualname__} {settings!r}"


def _program(model: ExitModel, k: int) -> tuple[str, dict[str, Tensor]] | None:
    """(the code of head k's graph, every tensor in it by name); None when it cannot be exported."""
    stages = model.stages()
    carry: Any = stages.start(three_rows(model.example))
    try:
        with torch.no_grad(), eval_mode(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for before in range(k + 1):
                tap, carry = stages.run(before, carry)
            takes = getattr(model.heads[k], "takes_mask", False) and carry.mask is not None
            given = (tap.clone(), carry.mask.clone()) if takes else (tap.clone(),)
            program = torch.export.export(HeadUnit(model, k).eval(), given)
    except Exception:  # of torch.export or of the head itself; who exports it says why
        return None
    tensors = {name: each for name, each in program.constants.items() if isinstance(each, Tensor)}
    return program.graph_module.code, {**program.state_dict, **tensors}
