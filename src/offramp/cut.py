"""Cutting a pure graph behind its taps, into one piece per exit.

Every value of the graph is one of these, by where the batch stands in its shape, and by what it is made of:

    rows       made of the inputs' rows; one axis is the batch, or a multiple of it   -> carried, leaves with its rows
    constant   made of neither the rows nor their number                              -> carried as it is
    sized      made of the number of rows, not of the rows: zeros(batch, ...)         -> made again in each piece
    size       a number that follows from the inputs' lengths                         -> computed again in each piece
    mixed      made of rows, but without an axis for them: x.mean(0)                  -> NotStageable

Work is put off to the first piece that needs it.
"""

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._sympy.printers import PythonPrinter

from offramp.graph import Traced, free_symbols, refuse

__all__ = ["Live", "Piece", "cut"]

EMPTY = tuple(
    f"aten.{name}"
    for name in ("new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like")
)


@dataclass(frozen=True)
class Live:
    """A value that goes from one piece to the next: `axis` is where its rows are, None for a constant.

    `multiple` is True when that axis holds several entries per row, those of one row beside each other.
    """

    name: str
    axis: int | None
    multiple: bool
    shape: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class Piece:
    """One piece of a graph: `call(*values, *sizes)` gives the tap, then what goes on, in the order of `leaves`.

    `sizes` are the numbers that the piece wants, as texts for `compile_sizes`. The last piece gives the logits alone.
    `tap` is the shape of what it gives first, in numbers and words as in `Live`.
    """

    module: fx.GraphModule
    enters: tuple[Live, ...]
    leaves: tuple[Live, ...]
    sizes: tuple[str, ...]
    tap: tuple[str, ...]
    nodes: int
    parameters: int


@dataclass(frozen=True)
class _Kinds:
    """What each node is, by the words at the head of this file, and where the rows of a `rows` node are."""

    kind: dict[fx.Node, str]
    axis: dict[fx.Node, tuple[int, bool]]


def cut(traced: Traced, keep: Sequence[str] = (), whole: bool = False) -> tuple[Piece, ...]:
    """The pieces of a graph: one that ends at each tap, in order, and one that ends at the logits.

    Args:
        traced: the pure graph.
        keep: names of inputs that every piece is given and hands on, even if nothing in the graph wants them.
        whole: do not cut: one piece that ends at the logits.

    Raises:
        NotStageable: a value is made of rows without an axis for them, or with several.
    """
    ends = (traced.logits,) if whole else (*traced.taps, traced.logits)
    stage = _stages_of(traced.graph, ends)
    kinds = _kinds(traced, stage)
    work = [_work(traced, stage, kinds, k) for k in range(len(ends))]
    wants = [_wants(work[k], kinds, end) for k, end in enumerate(ends)]
    wants[-1].update(node for node, name in zip(traced.inputs, traced.names, strict=True) if name in keep)
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    enters = []
    for k in range(len(ends)):
        later = set().union(*wants[k:])
        enters.append(sorted((n for n in later if n in traced.inputs or stage[n] < k), key=order.__getitem__))
    enters.append([])
    pieces = []
    for k, end in enumerate(ends):
        nodes = sorted(work[k], key=order.__getitem__)
        pieces.append(_piece(traced, kinds, nodes, (end, *enters[k + 1]), enters[k]))
    return tuple(pieces)


def _stages_of(graph: fx.Graph, ends: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """The first piece that needs each node; nodes that none needs are absent."""
    stage: dict[fx.Node, int] = {}
    for k, end in enumerate(ends):
        stage[end] = min(k, stage.get(end, k))
    for node in reversed(list(graph.nodes)):
        if node in stage:
            for source in node.all_input_nodes:
                stage[source] = min(stage[node], stage.get(source, stage[node]))
    for node in graph.nodes:  # a tuple is taken apart where it is made, because only its elements can be carried
        if node in stage and node.target is operator.getitem:
            stage[node] = stage[node.args[0]]
    return stage


def _kinds(traced: Traced, stage: dict[fx.Node, int]) -> _Kinds:
    batch, known = traced.symbols[0], frozenset(traced.symbols)
    kinds = _Kinds({}, {})
    for node in traced.graph.nodes:
        if node in traced.inputs:
            kinds.kind[node], kinds.axis[node] = "rows", (0, False)
        elif node in traced.weights:
            kinds.kind[node] = "weight"
        elif node in stage:
            kinds.kind[node] = _kind(node, kinds, batch, known)
            if kinds.kind[node] == "rows" and not isinstance(node.meta.get("val"), tuple | list):
                kinds.axis[node] = _row_axis(node, batch)
    return kinds


def _kind(node: fx.Node, kinds: _Kinds, batch: Any, known: frozenset[Any]) -> str:
    value = node.meta.get("val")
    symbols = free_symbols(node)
    if symbols and not isinstance(value, Tensor) and symbols <= known:
        return "size"
    sources = [kinds.kind[source] for source in node.all_input_nodes]
    blank = str(node.target).startswith(EMPTY)
    if "rows" in sources and not blank:
        return "rows"
    by_size = any(
        kinds.kind[source] == "size" and batch in free_symbols(source) for source in node.all_input_nodes
    ) or (blank and batch in symbols)
    return "sized" if by_size or "sized" in sources else "constant"


def _row_axis(node: fx.Node, batch: Any) -> tuple[int, bool]:
    """The axis of a node that holds the rows, and whether it holds several entries for each."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise refuse(node, "reads a number out of the rows", "Keep what depends on the data in tensors.")
    shape: Sequence[Any] = value.shape
    found = [
        (axis, length.node.expr)
        for axis, length in enumerate(shape)
        if not isinstance(length, int) and batch in length.node.expr.free_symbols
    ]
    if not found:
        raise refuse(
            node,
            f"mixes rows: it is made of the rows, but its shape {_words(shape)} has no axis for them",
            "A row's answer must not depend on its neighbours.",
        )
    if len(found) > 1:
        raise refuse(
            node,
            f"compares rows with rows: its shape {_words(shape)} has the batch on several axes",
            "A row's answer must not depend on its neighbours.",
        )
    axis, length = found[0]
    return axis, length != batch


def _words(shape: Sequence[Any]) -> str:
    return "[" + ", ".join(str(length) for length in shape) + "]"


def _work(traced: Traced, stage: dict[fx.Node, int], kinds: _Kinds, k: int) -> set[fx.Node]:
    """The operations of piece k: its own, and the `sized` ones that it makes (again)."""
    work = {
        node
        for node, at in stage.items()
        if at == k and node not in traced.inputs and kinds.kind[node] in ("rows", "constant")
    }
    todo = list(work)
    while todo:
        again = [
            source for source in todo.pop().all_input_nodes if kinds.kind[source] == "sized" and source not in work
        ]
        work.update(again)
        todo.extend(again)
    return work


def _wants(work: set[fx.Node], kinds: _Kinds, end: fx.Node) -> set[fx.Node]:
    """The values that a piece reads and does not make itself, except numbers and weights."""
    read = {source for node in work for source in node.all_input_nodes} | {end}
    return {node for node in read - work if kinds.kind[node] in ("rows", "constant")}


def _piece(
    traced: Traced, kinds: _Kinds, work: Sequence[fx.Node], gives: Sequence[fx.Node], enters: Sequence[fx.Node]
) -> Piece:
    """The piece that does `work` on `enters` and the numbers it needs, and gives `gives`."""
    graph, root = fx.Graph(), nn.Module()
    env = {node: graph.placeholder(node.name) for node in enters}
    read = dict.fromkeys(source for node in work for source in node.all_input_nodes)
    slots: dict[str, fx.Node] = {}
    for node in read:
        if kinds.kind[node] == "size":
            text = _numbered(PythonPrinter().doprint(node.meta["val"].node.expr), traced)
            if text not in slots:
                slots[text] = graph.placeholder(f"size_{len(slots)}")
            env[node] = slots[text]
    weights = {}
    for node in (*read, *gives):
        if kinds.kind[node] == "weight" and node not in env:
            weights[id(traced.weights[node])] = traced.weights[node]
            _set(root, f"w_{node.name}", traced.weights[node])
            env[node] = graph.get_attr(f"w_{node.name}")
    for node in work:
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        env[node] = graph.create_node("call_function", node.target, args, kwargs, name=node.name)
    leaves = gives[1:]
    last = gives[0] is traced.logits and not leaves
    graph.output(env[gives[0]] if last else tuple(env[node] for node in gives))
    return Piece(
        fx.GraphModule(root, graph, class_name="Piece"),
        tuple(_live(node, kinds, traced) for node in enters),
        tuple(_live(node, kinds, traced) for node in leaves),
        tuple(slots),
        tuple(_word(length, traced) for length in gives[0].meta["val"].shape),
        len(work),
        sum(weight.numel() for weight in weights.values() if isinstance(weight, nn.Parameter)),
    )


def _set(root: nn.Module, name: str, value: Any) -> None:
    """Give the piece a weight: a parameter is the model's own object, a buffer too."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(name, value, persistent=False)
    else:
        setattr(root, name, value)


def _live(node: fx.Node, kinds: _Kinds, traced: Traced) -> Live:
    name = traced.names[traced.inputs.index(node)] if node in traced.inputs else node.name
    axis, multiple = kinds.axis.get(node, (None, False))
    value = node.meta.get("val")
    shape = tuple(_word(length, traced) for length in value.shape) if isinstance(value, Tensor) else ()
    dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
    return Live(name, axis, multiple, shape, dtype)


def _word(length: Any, traced: Traced) -> str:
    """A length for a reader: a number, "batch", or an expression of "batch" and n1, n2, ... in the symbols' order."""
    return re.sub(r"\bn0\b", "batch", _numbered(str(length), traced))


def _numbered(text: str, traced: Traced) -> str:
    """A text with n0, n1, ... for the symbols, in their order."""
    places = {str(symbol): place for place, symbol in enumerate(traced.symbols)}
    return re.sub(r"\b[A-Za-z_]\w*\b", lambda found: f"n{places[found[0]]}" if found[0] in places else found[0], text)
