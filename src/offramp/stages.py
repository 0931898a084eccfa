"""Stages: a model cut behind its taps, and the carry that goes from one stage to the next.

carry = stages.start(inputs)
tap, carry = stages.run(0, carry)        # head 0 reads tap; rows that stop leave:
tap, carry = stages.run(1, carry.select(survivors))
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp.cut import Live, Piece, cut
from offramp.errors import FormatError, NotStageable, ShapeError
from offramp.graph import Axes, Traced, eval_mode
from offramp.heads import mask_weights
from offramp.inputs import Inputs, batch_size, names_of, tensors_of
from offramp.sizes import compile_sizes

__all__ = [
    "Carry", "CarryItem", "Parts", "StageInfo", "Stages", "stages_by_hand", "stages_of_graph", "stages_of_parts",
]  # fmt: skip


@dataclass(frozen=True)
class CarryItem:
    """One thing in a carry: `kind` is "rows", "constant" or "size"; lengths in `shape` are numbers or symbols."""

    name: str
    kind: str
    shape: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class StageInfo:
    """What one stage is: the tap it ends at, its operators, its parameters (numbers in them), and what it hands on."""

    k: int
    tap: str
    nodes: int
    parameters: int
    carry: tuple[CarryItem, ...]


class _Plan:
    """What is known of a carry before it exists: where each value has its rows, and which one is the mask."""

    __slots__ = ("mask", "moves", "plain")

    def __init__(self, live: Sequence[Live], mask: str | None) -> None:
        self.moves = tuple((item.axis, item.multiple) for item in live)
        self.plain = all(move == (0, False) for move in self.moves)
        names = [item.name for item in live]
        self.mask = names.index(mask) if mask in names else None


class Carry:
    """What goes on behind a tap: row tensors, constants, and the lengths that sizes are computed from."""

    __slots__ = ("_plan", "_symbols", "_values", "_weights", "batch")

    batch: int

    def __init__(self, plan: _Plan, values: tuple[Any, ...], batch: int, symbols: tuple[int, ...]) -> None:
        self._plan = plan
        self._values = values
        self.batch = batch
        self._symbols = symbols
        self._weights: Tensor | None = None

    @property
    def values(self) -> tuple[Any, ...]:
        """What is carried, in the order that the next stage takes it."""
        return self._values

    @property
    def mask(self) -> Tensor | None:
        """The attention mask [batch tok] of the rows that are still here, or None when no head needs it."""
        return None if self._plan.mask is None else self._values[self._plan.mask]

    def weights(self, dtype: torch.dtype) -> Tensor | None:
        """What each token counts in a mean [batch 1 tok], by the mask; made once for all heads of a run."""
        if self._plan.mask is None:
            return None
        if self._weights is None or self._weights.dtype is not dtype:
            self._weights = mask_weights(self._values[self._plan.mask], dtype)
        return self._weights

    def select(self, index: Tensor) -> "Carry":
        """The carry of the rows in `index` (row numbers int64 [rows], or bool [batch]), in that order.

        Rows leave every row tensor and the mask; constants stay; sizes follow from the survivors' number.
        """
        if index.dtype is torch.bool:
            index = index.nonzero().flatten()
        if self._plan.plain:
            values = tuple([value.index_select(0, index) for value in self._values])
        else:
            values = tuple(
                [
                    _select(value, axis, multiple, self.batch, index)
                    for value, (axis, multiple) in zip(self._values, self._plan.moves)  # noqa: B905
                ]
            )
        rest = Carry(self._plan, values, index.shape[0], self._symbols)
        if self._weights is not None:
            rest._weights = self._weights.index_select(0, index)
        return rest


def _select(value: Any, axis: int | None, multiple: bool, batch: int, index: Tensor) -> Any:
    if axis is None:
        return value
    if not multiple:
        return value.index_select(axis, index)
    apart = value.unflatten(axis, (batch, value.shape[axis] // batch))
    return apart.index_select(axis, index).flatten(axis, axis + 1)


@dataclass(frozen=True)
class Parts:
    """All that stages are made of: what a bundle writes down.

    Args:
        pieces: one per exit.
        uncut: the whole model as one piece.
        names: of the inputs.
        axes, dtypes: per input.
        ranges: least and greatest value of each symbol, the batch first.
        taps: their names.
        mask: the input that heads need besides their taps, or None.
    """

    pieces: tuple[Piece, ...]
    uncut: Piece
    names: tuple[str, ...]
    axes: tuple[Axes, ...]
    dtypes: tuple[torch.dtype, ...]
    ranges: tuple[tuple[int, ...], ...]
    taps: tuple[str, ...]
    mask: str | None


class Stages:
    """The stages of a model, E of them: stage k goes from carry to tap k, the last one to the model's own logits.

    Stages always compute in eval mode, whatever the model's training flag. Their weights are the model's own.
    """

    def __init__(
        self,
        calls: Sequence[Callable[..., Any]],
        sizes: Sequence[Callable[..., tuple[Any, ...]]],
        plans: Sequence[_Plan],
        bind: Callable[[Inputs], tuple[tuple[Any, ...], tuple[int, ...]]],
        whole: Callable[[Inputs], Tensor],
        infos: Sequence[StageInfo],
        parts: Parts | None = None,
    ) -> None:
        self._last = len(calls) - 1
        self._steps = tuple(zip(calls, sizes, (*plans[1:], None), strict=True))
        self._first = plans[0]
        self._bind = bind
        self._whole = whole
        self._infos = tuple(infos)
        self.parts = parts  # None for stages given by hand

    def __len__(self) -> int:
        return len(self._steps)

    def start(self, inputs: Inputs) -> Carry:
        """The carry into stage 0.

        Raises:
            ShapeError: a name, an axis or a length differs from what the stages were cut for.
        """
        values, symbols = self._bind(inputs)
        return Carry(self._first, values, symbols[0], symbols[1:])

    def run(self, k: int, carry: Carry) -> tuple[Tensor, Carry | None]:
        """Tap k of the rows in the carry and the carry into stage k+1; behind the last stage, the logits and None."""
        call, sizes, plan = self._steps[k]
        out = call(*carry._values, *sizes(carry.batch, *carry._symbols))
        if plan is None:
            return out, None
        after = Carry(plan, out[1:], carry.batch, carry._symbols)
        if carry._weights is not None and after.mask is carry.mask:
            after._weights = carry._weights
        return out[0], after

    def after(self, k: int, carry: Carry, values: tuple[Any, ...]) -> Carry:
        """The carry of these values into stage k+1, when another engine ran stage k on the rows of `carry`."""
        plan = self._steps[k][2]
        if plan is None:
            raise ShapeError(f"stage {k} is the last one; nothing goes on behind it.")
        return Carry(plan, values, carry.batch, carry._symbols)

    def whole(self, inputs: Inputs) -> Tensor:
        """The model's own logits [batch cls] from the same graph, not cut: the plain model in the same engine."""
        return self._whole(inputs)

    def describe(self) -> list[StageInfo]:
        """One entry per stage, in order."""
        return list(self._infos)


def stages_of_graph(traced: Traced, taps: Sequence[str], mask: str | None) -> Stages:
    """The stages of a traced model; `mask` is the name of the input that heads need besides their taps.

    Raises:
        NotStageable: the rows cannot be told apart at a cut.
    """
    (uncut,) = cut(traced, whole=True)
    parts = Parts(
        pieces=cut(traced, keep=() if mask is None else (mask,)),
        uncut=uncut,
        names=traced.names,
        axes=traced.axes,
        dtypes=tuple(node.meta["val"].dtype for node in traced.inputs),
        ranges=traced.ranges,
        taps=tuple(taps),
        mask=mask,
    )
    try:
        return stages_of_parts(parts)
    except FormatError as error:
        raise NotStageable(f"The model cannot be cut, because {error} Give attach(..., stages=[...]).") from None


def stages_of_parts(parts: Parts) -> Stages:
    """The stages that run the parts; they keep them as `stages.parts`."""
    pieces, symbols = parts.pieces, len(parts.ranges)

    def binder(piece: Piece) -> Callable[[Inputs], tuple[tuple[Any, ...], tuple[int, ...]]]:
        return _binder(parts.names, parts.axes, parts.dtypes, parts.ranges, [item.name for item in piece.enters])

    bind_uncut, call, sizes = binder(parts.uncut), parts.uncut.module.forward, compile_sizes(parts.uncut.sizes, symbols)

    def whole(given: Inputs) -> Tensor:
        values, numbers = bind_uncut(given)
        return call(*values, *sizes(*numbers))

    return Stages(
        [piece.module.forward for piece in pieces],
        [compile_sizes(piece.sizes, symbols) for piece in pieces],
        [_Plan(piece.enters, parts.mask) for piece in pieces],
        binder(pieces[0]),
        whole,
        [
            _info(k, name, piece, symbols)
            for k, (name, piece) in enumerate(zip((*parts.taps, "logits"), pieces, strict=True))
        ],
        parts,
    )


def _binder(
    names: Sequence[str],
    axes: Sequence[Axes],
    dtypes: Sequence[torch.dtype],
    ranges: Sequence[tuple[int, ...]],
    wanted: Sequence[str],
) -> Callable[[Inputs], tuple[tuple[Any, ...], tuple[int, ...]]]:
    """A function from inputs to the tensors called `wanted` and the values of the symbols, which it checks."""
    fixed = [[(axis, n) for axis, n in enumerate(entry) if isinstance(n, int)] for entry in axes]
    free = [[(axis, n[0]) for axis, n in enumerate(entry) if not isinstance(n, int)] for entry in axes]
    ndims = [len(entry) for entry in axes]
    whole = [not (dtype.is_floating_point or dtype.is_complex) for dtype in dtypes]
    single = names == ("input",)
    picks = [names.index(name) for name in wanted]
    lengths = list(enumerate(ranges))[1:]  # any number of rows is good

    def bind(inputs: Inputs) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        tensors: tuple[Tensor, ...]
        if isinstance(inputs, Tensor):
            tensors = (inputs,) if single else ()
        else:
            tensors = tuple([inputs[name] for name in names if name in inputs])
        if len(tensors) != len(names) or (not isinstance(inputs, Tensor) and len(inputs) != len(names)):
            raise ShapeError(f"Inputs are {list(names_of(inputs))}; expected {list(names)}, as in the example.")
        symbols = [0] * len(ranges)
        for i, tensor in enumerate(tensors):
            shape = tensor.shape
            good = len(shape) == ndims[i]
            for axis, length in fixed[i] if good else ():
                good = good and shape[axis] == length
            for axis, place in free[i] if good else ():
                good = good and symbols[place] in (0, shape[axis])
                symbols[place] = shape[axis]
            if not good:
                raise _misfit(names[i], axes[i], tensor)
            if tensor.dtype is not dtypes[i]:
                if not whole[i] or tensor.is_floating_point() or tensor.is_complex():
                    raise ShapeError(
                        f"Input {names[i]!r} is {tensor.dtype}; the stages were cut for {dtypes[i]}. Cast the input."
                    )
                tensors = (*tensors[:i], tensor.to(dtypes[i]), *tensors[i + 1 :])
        for place, (least, most) in lengths:
            if not least <= symbols[place] <= most:
                limit = f", {most} at most" if most < 2**61 else ""
                raise ShapeError(
                    f"An input is {symbols[place]} long; the stages take {least} or more{limit}. Pad or cut the inputs."
                )
        return tuple([tensors[i] for i in picks]), tuple(symbols)

    return bind


def _misfit(name: str, axes: Axes, tensor: Tensor) -> ShapeError:
    expected = ", ".join(str(n) if isinstance(n, int) else f"n{n[0]}" if n[0] else "batch" for n in axes)
    return ShapeError(
        f"Input {name!r} has shape {list(tensor.shape)}; the stages were cut for [{expected}], "
        f"with the same lengths in all inputs. Give attach dynamic={{{name!r}: (axis, ...)}} for other lengths."
    )


def _info(k: int, tap: str, piece: Piece, symbols: int) -> StageInfo:
    items = [
        CarryItem(item.name, "constant" if item.axis is None else "rows", item.shape, item.dtype)
        for item in piece.leaves
    ]
    if piece.leaves:
        items += [CarryItem(f"n{j}" if j else "batch", "size", (), "int") for j in range(symbols)]
    return StageInfo(k, tap, piece.nodes, piece.parameters, tuple(items))


def stages_by_hand(
    modules: Sequence[nn.Module],
    names: Sequence[str],
    taps: Sequence[str],
    mask: str | None,
    plain: Callable[[Inputs], Tensor],
) -> Stages:
    """The stages that the user wrote: module k goes from tap k-1, the first from the inputs, to tap k or the logits.

    Args:
        modules: one per exit.
        names: the inputs' names; with a mapping, module 0 is called with them as keywords.
        taps: the taps' names.
        mask: the input that heads need besides their taps, or None.
        plain: gives the model's own logits from inputs.
    """
    if len(modules) != len(taps) + 1:
        raise NotStageable(f"stages= has {len(modules)} entries for {len(taps)} taps; expected {len(taps) + 1}.")
    single = tuple(names) == ("input",)
    picks = tuple(names) + ((mask,) if mask is not None and mask not in names else ())

    def bind(inputs: Inputs) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        values = tensors_of(inputs) if isinstance(inputs, Tensor) else tuple(inputs[name] for name in picks)
        return values, (batch_size(inputs),)

    def first(*values: Tensor) -> Any:
        tap = _eval(modules[0], *values) if single else _eval(modules[0], **dict(zip(picks, values, strict=True)))
        return (tap, tap) if mask is None else (tap, tap, values[picks.index(mask)])

    def later(k: int) -> Callable[..., Any]:
        def call(x: Tensor, *rest: Tensor) -> Any:
            tap = _eval(modules[k], x)
            return tap if k == len(modules) - 1 else (tap, tap, *rest)

        return call

    rows = [Live(name, 0, False, (), "") for name in ("tap", *(() if mask is None else (mask,)))]
    start = [Live(name, 0, False, (), "") for name in picks]
    infos = []
    for k, (tap, module) in enumerate(zip((*taps, "logits"), modules, strict=True)):
        carry = () if k == len(taps) else tuple(CarryItem(item.name, "rows", ("batch", "..."), "") for item in rows)
        numbers = sum(p.numel() for p in module.parameters())
        infos.append(StageInfo(k, tap, sum(1 for _ in module.modules()), numbers, carry))
    return Stages(
        [first, *(later(k) for k in range(1, len(modules)))],
        [lambda *symbols: ()] * len(modules),
        [_Plan(start if k == 0 else rows, mask) for k in range(len(modules))],
        bind,
        plain,
        infos,
    )


def _eval(module: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    if not module.training:
        return module(*args, **kwargs)
    with eval_mode(module):
        return module(*args, **kwargs)
