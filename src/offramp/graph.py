"""The graph of a model: exported once, with a marker behind every tap, and made pure.

Pure means: no writes in place, no checks, no operators that do nothing in eval mode. Then any cut of it is legal
and what remains to be said of a value is where it has the rows (see `cut.py`).
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from offramp.errors import NotStageable
from offramp.inputs import Inputs, names_of, tensors_of
from offramp.taps import Tap, listen, logits_of

__all__ = [
    "Axes",
    "Dynamic",
    "Traced",
    "eval_mode",
    "first_line",
    "free_symbols",
    "own_precision",
    "refuse",
    "three_rows",
    "trace",
    "where",
]

# input name -> axes besides the rows whose length may differ from call to call
Dynamic = Mapping[str, Sequence[int]]

# per axis of an input: an int for a fixed length, or a 1-tuple with the place of its symbol
Axes = tuple[int | tuple[int], ...]

WHOLE = 2**62  # slices end at the largest int64 when they take all


@torch.library.custom_op("offramp::tap", mutates_args=(), schema="(Tensor x, int k) -> Tensor")
def _mark(x: Tensor, k: int) -> Tensor:
    return x.clone()


@_mark.register_fake
def _(x: Tensor, k: int) -> Tensor:
    return torch.empty_like(x)


@dataclass(frozen=True)
class Traced:
    """A pure graph: `taps` and `logits` are the values that leave it, `weights` what its other placeholders stand for.

    `symbols` are the lengths that may vary, the batch first; `ranges` their least and greatest values.
    `axes` has an entry for each input.
    """

    graph: fx.Graph
    taps: tuple[fx.Node, ...]
    logits: fx.Node
    names: tuple[str, ...]
    inputs: tuple[fx.Node, ...]
    weights: dict[fx.Node, Any]
    symbols: tuple[Any, ...]
    ranges: tuple[tuple[int, ...], ...]
    axes: tuple[Axes, ...]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The block runs with the model in eval mode; afterwards every module has its own training flag back."""
    flags = list[tuple[nn.Module, bool]]()
    if _trains(model):  # setting what is set takes as long as a token of a small decoder
        flags = [(module, module.training) for module in model.modules()]
        model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _trains(model: nn.Module) -> bool:
    """Whether any part is in training mode, in a third of the time that `modules()` takes for its names."""
    if model.training:
        return True
    left, seen = [model], {id(model)}
    while left:
        for part in left.pop()._modules.values():
            if part is None:
                continue
            if part.training:
                return True
            if part._modules and id(part) not in seen:
                seen.add(id(part))
                left.append(part)
    return False


@contextmanager
def own_precision(device: torch.device | None) -> Iterator[None]:
    """The block runs outside the caller's autocast, whose casts an export would keep for good."""
    with torch.autocast("cpu", enabled=False):
        if device is None or device.type in ("cpu", "meta"):
            yield
        else:
            with torch.autocast(device.type, enabled=False):
                yield


def three_rows(example: Inputs) -> Inputs:
    """The example with three rows that differ, so that a batch of 1 is not taken for a constant and mixing shows.

    Missing rows repeat earlier ones; these and rows that equal an earlier one are changed a little: numbers by noise,
    tokens by turning the row around.
    """
    tensors = []
    noise = torch.Generator().manual_seed(0)
    given = tensors_of(example)
    have = given[0].shape[0]
    same = [r for r in range(1, 3) if any(all(torch.equal(t[r % have], t[e % have]) for t in given) for e in range(r))]
    for tensor in given:
        rows = [tensor[r % have] for r in range(3)]
        for r in same:
            row = rows[r]
            if row.is_floating_point():
                scale = row.float().std().item() if row.numel() > 1 else 0.0
                extra = torch.randn(row.shape, generator=noise).to(row.device)
                rows[r] = (row + extra * max(0.1 * scale, 0.01)).to(row.dtype)
            elif row.ndim:
                rows[r] = row.roll(r, 0)
        tensors.append(torch.stack(rows).detach())
    return tensors[0] if isinstance(example, Tensor) else dict(zip(names_of(example), tensors, strict=True))


def trace(model: nn.Module, taps: Sequence[Tap], example: Inputs, dynamic: Dynamic | None = None) -> Traced:
    """The pure graph of the model in eval mode, from an example of three rows (see `three_rows`).

    Raises:
        NotStageable: the model cannot be exported with a batch that varies, or a tap is not seen by the export.
    """
    try:
        program = _export(model, taps, example, dynamic)
    except NotStageable:
        raise
    except Exception as error:
        raise NotStageable(
            f"{type(model).__name__} cannot be cut, because torch.export fails: {first_line(error)} "
            "Take what depends on the data's values out of its forward (ifs, .item(), loops over rows), or give "
            "attach(..., stages=[...]). Training, recording and calibrating work as it is."
        ) from error
    tidy = _tidied(program)
    if tidy is None:  # a write in place that has no simple twin: let torch rewrite the whole graph
        tidy = _tidied(program.run_decompositions({}))
    if tidy is None:
        raise NotStageable(
            f"{type(model).__name__} cannot be cut: its graph still writes in place. Avoid `x[...] = y`."
        )
    return _described(model, tidy, names_of(example), len(taps))


def free_symbols(node: fx.Node) -> frozenset[Any]:
    """The symbols in the shape of a node's tensor, or in the number that it is."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return frozenset().union(*(_symbols_in(length) for length in value.shape))
    return _symbols_in(value)


def where(node: fx.Node) -> str:
    """A node for a message: operator, module and line of the model's source."""
    name = getattr(node.target, "__name__", str(node.target))
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]).partition("model.")[2] if stack else ""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    source = next((line for line in reversed(lines) if not line.startswith(("File", "^", "~"))), "")
    return f"{node.name} ({name})" + (f" in module {path!r}" if path else "") + (f" at `{source}`" if source else "")


def refuse(node: fx.Node, why: str, cure: str) -> NotStageable:
    """The error that says that `node` is in the way of cutting the model."""
    return NotStageable(
        f"The model cannot be cut: {where(node)} {why}. {cure} Training, recording and calibrating work as it is."
    )


def first_line(error: BaseException) -> str:
    """The kind and the first line of an error's message, for quoting in another."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0][:300] if lines else "no message"
    return f"{type(error).__name__}: {text}{'' if text.endswith('.') else '.'}"


class _Flat(nn.Module):
    """The model as a function of tensors by position, giving its logits alone."""

    def __init__(self, model: nn.Module, names: tuple[str, ...] | None, restart: Callable[[], None]) -> None:
        super().__init__()
        self.model = model
        self._names = names
        self._restart = restart

    def forward(self, *tensors: Tensor) -> Tensor:
        self._restart()  # an exporter may run this more than once
        output = self.model(tensors[0]) if self._names is None else self.model(**dict(zip(self._names, tensors)))  # noqa: B905
        return logits_of(output, self.model)


def _export(model: nn.Module, taps: Sequence[Tap], example: Inputs, dynamic: Dynamic | None) -> ExportedProgram:
    batch = Dim("batch", min=1)
    names, tensors = names_of(example), tensors_of(example)
    shapes = tuple(
        {0: batch, **dict.fromkeys(_free_axes(name, tensor, dynamic), Dim.AUTO)}
        for name, tensor in zip(names, tensors, strict=True)
    )
    with eval_mode(model), torch.no_grad(), listen(model, taps, lambda k, x: torch.ops.offramp.tap(x, k)) as calls:

        def restart() -> None:
            calls.clear()

        flat = _Flat(model, None if isinstance(example, Tensor) else names, restart).eval()
        return torch.export.export(flat, tensors, dynamic_shapes={"tensors": shapes}, strict=False)


def _free_axes(name: str, tensor: Tensor, dynamic: Dynamic | None) -> Sequence[int]:
    """The axes of an input besides the rows that may vary: the tokens of integer [batch tok], unless told."""
    if dynamic is not None:
        return [axis for axis in dynamic.get(name, ()) if axis != 0]
    return [1] if tensor.ndim == 2 and not tensor.is_floating_point() and tensor.shape[1] > 1 else []


def _symbols_in(value: Any) -> frozenset[Any]:
    node = getattr(value, "node", None)
    return frozenset(node.expr.free_symbols) if node is not None and hasattr(node, "expr") else frozenset()


def _tidied(program: ExportedProgram) -> ExportedProgram | None:
    """The program with its graph made pure, or None when a write in place has no simple twin."""
    graph = program.graph_module.graph
    weights = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is not InputKind.USER_INPUT}
    for node in list(graph.nodes):
        if _is_check(node):
            graph.erase_node(node)
        elif (same := _stands_for(node)) is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not _writes(node):
            continue
        if node.args[0].op == "placeholder" and node.args[0].name in weights:
            raise refuse(node, "writes to a buffer in eval mode", "Write to buffers in training mode only.")
        twin = _twin(node, order)
        if twin is None:
            return None
        node.target = twin
        node.args[0].replace_all_uses_with(node, delete_user_cb=lambda user, at=order[node]: order[user] > at)
    return program


def _is_check(node: fx.Node) -> bool:
    """Whether a node only checks something: it returns nothing, or is a call of guards."""
    if node.op == "call_module":
        return "guards" in str(node.target)
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.returns and not node.users and not schema.is_mutable


def _stands_for(node: fx.Node) -> fx.Node | None:
    """The node whose value this one repeats in eval mode, or None when it does something."""
    target = str(node.target)
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    first = node.args[0]
    rest = node.args[1:]
    if target in ("aten.alias.default", "aten.detach.default", "aten.detach_.default"):
        return first
    if "dropout" in target:
        return first if len(rest) == 2 and rest[1] is False else None
    if target == "aten.slice.Tensor":
        given = list(rest[1:])
        start, end, step = given + [0, WHOLE, 1][len(given) :]
        whole = start in (0, None) and (end is None or (isinstance(end, int) and end >= WHOLE)) and step == 1
        return first if whole else None
    if target.startswith("aten.to."):
        old, new = first.meta.get("val"), node.meta.get("val")
        same = (
            isinstance(old, Tensor) and isinstance(new, Tensor) and (old.dtype, old.device) == (new.dtype, new.device)
        )
        return first if same and not node.kwargs.get("copy") and node.kwargs.get("memory_format") is None else None
    return None


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _views(node: fx.Node) -> bool:
    """Whether a node's value may share memory with another's."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return True  # a placeholder, or an element of a split tensor
    return any(value.alias_info is not None for value in schema.returns)


def _twin(node: fx.Node, order: dict[fx.Node, int]) -> Any:
    """The operator that does the same without writing, or None when others may see what is written."""
    written, target = node.args[0], node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._opname
    if not isinstance(written, fx.Node) or not name.endswith("_") or node.kwargs.get("out") is not None:
        return None
    # an operator that was in place itself is fresh: its twin has taken its place by now
    if written.op == "call_function" and _views(written):
        return None
    if any(_views(user) and user.op == "call_function" and order[user] < order[node] for user in written.users):
        return None
    packet = getattr(getattr(torch.ops, target.namespace), name[:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _described(model: nn.Module, program: ExportedProgram, names: tuple[str, ...], taps: int) -> Traced:
    """The traced graph of a tidy program: markers gone, weights found, symbols named."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):  # an element stands beside its tuple, so that only single values cross a cut
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            node.args[0].append(node)
    values: dict[int, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is torch.ops.offramp.tap.default:
            values[node.args[1]] = node.args[0]
            node.replace_all_uses_with(node.args[0])
    missing = sorted(set(range(taps)) - set(values))
    if missing:
        raise NotStageable(
            f"The export of {type(model).__name__} does not show tap {missing[0]}; it may lie in a region of its own, "
            "such as torch.no_grad or autocast. Tap a module outside it."
        )
    inputs, weights = _placeholders(model, program)
    symbols, axes = _axes_of(inputs, names)
    ranges = tuple(_range(program.range_constraints.get(symbol)) for symbol in symbols)
    outputs = graph.output_node().args[0]
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    logits = outputs[kinds.index(OutputKind.USER_OUTPUT)]
    ordered = tuple(values[k] for k in range(taps))
    return Traced(graph, ordered, logits, names, inputs, weights, symbols, ranges, axes)


def _placeholders(model: nn.Module, program: ExportedProgram) -> tuple[tuple[fx.Node, ...], dict[fx.Node, Any]]:
    """The placeholders that are inputs, and what the others stand for: the model's own parameters and buffers."""
    owned: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    owned.update(model.named_buffers(remove_duplicate=False))
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    inputs, weights = [], {}
    for node in program.graph_module.graph.nodes:
        if node.op == "get_attr":
            weights[node] = operator.attrgetter(str(node.target))(program.graph_module)
        if node.op != "placeholder":
            continue
        spec = specs[node.name]
        name = str(spec.target).removeprefix("model.")
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and name in owned:
            weights[node] = owned[name]
        else:
            weights[node] = program.constants[str(spec.target)]
    return tuple(inputs), weights


def _axes_of(inputs: Sequence[fx.Node], names: Sequence[str]) -> tuple[tuple[Any, ...], tuple[Axes, ...]]:
    """The symbols of the inputs' lengths, the batch first; per input and axis a fixed length or a symbol's place."""
    symbols: list[Any] = []
    axes = []
    for node, name in zip(inputs, names, strict=True):
        entry: list[int | tuple[int]] = []
        for axis, length in enumerate(node.meta["val"].shape):
            if isinstance(length, int):
                if axis == 0:
                    raise NotStageable(f"The export fixed the number of rows of input {name!r} to {length}.")
                entry.append(length)
                continue
            if length.node.expr not in symbols:
                symbols.append(length.node.expr)
            entry.append((symbols.index(length.node.expr),))
        axes.append(tuple(entry))
    return tuple(symbols), tuple(axes)


def _range(found: Any) -> tuple[int, ...]:
    if found is None:
        return 1, 2**62
    return tuple(int(end) if end.is_Integer else none for end, none in ((found.lower, 1), (found.upper, 2**62)))
