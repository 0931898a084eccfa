"""A model with exits that was read from data: stages and heads as programs, without the code that made them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from offramp.bundle.program import Weights, decode_piece, dtype_of, encode_piece
from offramp.checkpoints import named_tensors
from offramp.cut import Piece, cut
from offramp.errors import FormatError, NotStageable
from offramp.graph import eval_mode, three_rows, trace
from offramp.inputs import Inputs, mask_of
from offramp.model import ExitModel
from offramp.record import to_device
from offramp.sizes import compile_sizes
from offramp.stages import Parts, Stages, stages_of_parts

__all__ = ["BundledModel", "HeadProgram", "decode_model", "encode_model"]


@dataclass(frozen=True)
class HeadProgram:
    """A head as a piece of a graph. `lengths` says, for each symbol, which input (0 tap, 1 mask) and axis it is."""

    piece: Piece
    lengths: tuple[tuple[int, int], ...]
    takes_mask: bool


class _Head(nn.Module):
    def __init__(self, program: HeadProgram) -> None:
        super().__init__()
        self._lengths = program.lengths
        self.module = program.piece.module
        self.takes_mask = program.takes_mask
        self._sizes = compile_sizes(program.piece.sizes, len(program.lengths))
        self._picks = [("tap", "mask").index(item.name) for item in program.piece.enters]

    def forward(self, tap: Tensor, mask: Tensor | None = None) -> Tensor:
        given = (tap, mask)
        numbers = [given[i].shape[axis] for i, axis in self._lengths]  # type: ignore[union-attr]
        return self.module(*[given[i] for i in self._picks], *self._sizes(*numbers))


class BundledModel(ExitModel):
    """A model with exits from a bundle. It runs, records and is measured as the original; it is not trained.

    Args:
        parts: of the stages.
        heads: one for each exit but the last.
        classes: the number of classes.
        weights: by the names that they have in the bundle.
        example: inputs of three rows.
        signals: what the heads say beyond logits.
    """

    def __init__(
        self,
        parts: Parts,
        heads: Sequence[HeadProgram],
        classes: int,
        weights: Mapping[str, Tensor],
        example: Inputs,
        signals: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self._example = example
        self.weights = dict(weights)
        self.backbone = nn.ModuleList([*(piece.module for piece in parts.pieces), parts.uncut.module])
        self.programs = tuple(heads)
        self.heads = nn.ModuleList([_Head(head) for head in heads])
        self.taps = parts.taps
        self.classes = classes
        self.signals = signals
        self._stages = stages_of_parts(parts)
        self.eval()

    @property
    def example(self) -> Inputs:
        """The inputs that the bundle was checked on, three rows."""
        return self._example

    def stages(self) -> Stages:
        """The stages as they were read."""
        return self._stages

    def plain(self, inputs: Inputs) -> Float[Tensor, "batch cls"]:
        """The original's own logits; no head runs."""
        return self._stages.whole(inputs)

    def forward(self, inputs: Inputs) -> Float[Tensor, "exit batch cls"]:
        """The logits of every exit; the last are the original's."""
        taps, last = self._heard(inputs)
        mask = mask_of(inputs)
        return torch.stack([*(self.head_logits(k, tap, mask) for k, tap in enumerate(taps)), last])

    def forward_with_signals(
        self, inputs: Inputs
    ) -> tuple[Float[Tensor, "exit batch cls"], Float[Tensor, "exit batch sig"] | None]:
        """(the logits of every exit, their signals or None); signals are zeros at the last exit."""
        taps, last = self._heard(inputs)
        mask = mask_of(inputs)
        return self._with_signals(last, [self.evidence(k, tap, mask) for k, tap in enumerate(taps)])

    def _heard(self, inputs: Inputs) -> tuple[list[Tensor], Tensor]:
        """What came by at each tap, and the original's logits."""
        carry, taps = self._stages.start(inputs), []
        for k in range(self.exits):
            tap, after = self._stages.run(k, carry)
            taps.append(tap)
            carry = after  # type: ignore[assignment]
        return taps[:-1], taps[-1]


def encode_model(model: ExitModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the programs of a model as a JSON value, its weights by name).

    Raises:
        NotStageable: the model cannot be cut, was cut by hand, or has an operator that a bundle does not hold.
    """
    parts = model.stages().parts
    if parts is None:
        raise NotStageable(
            "the stages were given by hand (attach(..., stages=[...])), and a bundle holds stages that were cut from "
            "the graph. Attach without stages=."
        )
    weights = Weights(model.weights if isinstance(model, BundledModel) else dict(named_tensors(model)))
    heads = model.programs if isinstance(model, BundledModel) else _heads(model, parts)
    value = {
        "classes": model.classes,
        "taps": list(parts.taps),
        "mask": parts.mask,
        "inputs": [
            {"name": name, "axes": [n if isinstance(n, int) else f"n{n[0]}" for n in axes], "dtype": _name(dtype)}
            for name, axes, dtype in zip(parts.names, parts.axes, parts.dtypes, strict=True)
        ],
        "ranges": [list(ends) for ends in parts.ranges],
        "stages": [encode_piece(piece, weights) for piece in parts.pieces],
        "whole": encode_piece(parts.uncut, weights),
        "heads": [
            {
                "lengths": [list(length) for length in head.lengths],
                "takes_mask": head.takes_mask,
                "program": encode_piece(head.piece, weights),
            }
            for head in heads
        ],
    }
    if model.signals:  # absent means none, as in bundles of before there were any
        value["signals"] = list(model.signals)
    return value, weights.tensors


def decode_model(value: Any, weights: Mapping[str, Tensor], example: Inputs, device: torch.device) -> BundledModel:
    """The model of a JSON value; its weights and its example are put on the device.

    Raises:
        FormatError: the value is damaged or does not fit its weights.
    """
    held = {name: _placed(tensor, device) for name, tensor in weights.items()}
    try:
        symbols = len(value["ranges"])
        pieces = tuple(decode_piece(piece, held, symbols, device) for piece in value["stages"])
        parts = Parts(
            pieces=pieces,
            uncut=decode_piece(value["whole"], held, symbols, device),
            names=tuple(item["name"] for item in value["inputs"]),
            axes=tuple(tuple(_axis(n, symbols) for n in item["axes"]) for item in value["inputs"]),
            dtypes=tuple(dtype_of(item["dtype"]) for item in value["inputs"]),
            ranges=tuple((int(least), int(most)) for least, most in value["ranges"]),
            taps=tuple(map(str, value["taps"])),
            mask=value["mask"],
        )
        heads = [_decode_head(head, held, device) for head in value["heads"]]
        _check(parts, heads, value["classes"])
        signals = _signals(value.get("signals", []))
        return BundledModel(parts, heads, value["classes"], held, to_device(example, device), signals)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, StopIteration) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"its programs are damaged ({type(error).__name__}: {str(error)[:200]}).") from None


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.to(device)
    return nn.Parameter(moved, requires_grad=False) if moved.is_floating_point() else moved


def _check(parts: Parts, heads: Sequence[HeadProgram], classes: Any) -> None:
    exits = len(parts.pieces)
    if len(heads) != exits - 1 or len(parts.taps) != exits - 1 or type(classes) is not int or classes < 2:
        raise FormatError(f"it has {exits} stages, {len(heads)} heads, {len(parts.taps)} taps and {classes} classes.")
    names = [{item.name for item in piece.enters} for piece in parts.pieces]
    hands_on = [{item.name for item in piece.leaves} for piece in parts.pieces]
    fits = all(names[k + 1] == hands_on[k] for k in range(exits - 1)) and not hands_on[-1]
    if not fits or not names[0] <= set(parts.names) or len(set(parts.names)) != len(parts.names):
        raise FormatError("its stages do not hand on what the next ones want.")
    if not {item.name for item in parts.uncut.enters} <= set(parts.names) or parts.uncut.leaves:
        raise FormatError("its whole program does not fit its inputs.")
    if parts.mask is not None and parts.mask not in parts.names:
        raise FormatError(f"its mask {parts.mask!r} is no input.")
    if any(head.takes_mask for head in heads) and parts.mask is None:
        raise FormatError("a head wants a mask, and there is none.")


def _signals(names: Any) -> tuple[str, ...]:
    known = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not known or len(set(names)) != len(names):
        raise FormatError(f"its signals are {str(names)[:80]}; expected different names.")
    return tuple(names)


def _axis(n: Any, symbols: int) -> int | tuple[int]:
    if type(n) is int and n >= 0:
        return n
    if isinstance(n, str) and n[1:].isdecimal() and n[0] == "n" and int(n[1:]) < symbols:
        return (int(n[1:]),)
    raise FormatError(f"an axis is {n!r}.")


def _decode_head(value: Any, weights: Mapping[str, Tensor], device: torch.device) -> HeadProgram:
    lengths, takes_mask = tuple((int(i), int(axis)) for i, axis in value["lengths"]), value["takes_mask"] is True
    if any(i not in range(1 + takes_mask) or not 0 <= axis < 8 for i, axis in lengths):
        raise FormatError("the lengths of a head are damaged.")
    piece = decode_piece(value["program"], weights, len(lengths), device)
    if not {item.name for item in piece.enters} <= {"tap", "mask"} or piece.leaves:
        raise FormatError("the program of a head has other inputs than a tap and a mask.")
    return HeadProgram(piece, lengths, takes_mask)


class _Named(nn.Module):
    """A head as a function of named inputs, for the export."""

    def __init__(self, head: nn.Module, takes_mask: bool) -> None:
        super().__init__()
        self.head = head
        self.takes_mask = takes_mask

    def forward(self, tap: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(tap, mask) if self.takes_mask else self.head(tap)


def _heads(model: ExitModel, parts: Parts) -> Sequence[HeadProgram]:
    """The heads as programs, exported on the taps of the model's example."""
    stages, found = model.stages(), []
    carry = stages.start(three_rows(model.example))
    for k, head in enumerate(model.heads):
        with torch.no_grad():
            tap, carry = stages.run(k, carry)  # type: ignore[assignment]
        takes_mask = bool(getattr(head, "takes_mask", False)) and carry.mask is not None
        inputs: dict[str, Any] = {"tap": tap} | ({"mask": carry.mask} if takes_mask else {})
        free = tuple(axis for axis, word in enumerate(parts.pieces[k].tap) if axis and not word.isdecimal())
        with eval_mode(head):
            traced = trace(_Named(head, takes_mask), (), inputs, {"tap": free, "mask": (1,)})
        (piece,) = cut(traced, whole=True)
        lengths = [
            next((i, axis) for i, axes in enumerate(traced.axes) for axis, n in enumerate(axes) if n == (place,))
            for place in range(len(traced.symbols))
        ]
        found.append(HeadProgram(piece, tuple(lengths), takes_mask))
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
