"""Graphs as data: the pieces of a model as JSON, its weights beside them, and back again without running code.

torch's own archive of an exported program is not used here: reading one unpickles, evaluates sympy texts and runs
generated Python, so a file from somebody else is a program; and it would hold a weight once for every stage that shares
it. A graph from `torch.export`, cut behind the taps, is a list of calls of ATen operators. That list is written as it
is, and only such operators as neither write to their arguments nor touch anything outside them are read back.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from offramp.cut import Live, Piece
from offramp.errors import FormatError, NotStageable
from offramp.sizes import compile_sizes

__all__ = ["Weights", "decode_piece", "dtype_of", "encode_piece"]

MOST_NODES = 200_000
#: Operators with names like private ones that exports contain.
PRIVATE = frozenset(
    (
        *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_log_softmax", "_softmax", "_safe_softmax", "_to_copy"),
        *("_native_batch_norm_legit_no_training", "_unsafe_view", "_scaled_dot_product_flash_attention_for_cpu"),
        *("__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "_thnn_fused_lstm_cell"),
    )
)
REFUSED = frozenset({"from_file", "sym_constrain_range", "sym_constrain_range_for_size"})
GETITEM = "getitem"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
FORMATS = {
    str(form).removeprefix("torch."): form
    for form in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)
}


class Weights:
    """The tensors of a model, each once, under names that a reader knows.

    Args:
        known: name -> tensor; what is met without a name is called `constant.N`.
    """

    def __init__(self, known: Mapping[str, Tensor]) -> None:
        self._known = {id(tensor): name for name, tensor in reversed(list(known.items()))}
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def name(self, tensor: Tensor) -> str:
        """The tensor's name; it is among `tensors` from now on."""
        if id(tensor) not in self._names:
            name = self._known.get(id(tensor)) or f"constant.{len(self.tensors)}"
            self._names[id(tensor)] = name
            self.tensors[name] = tensor
        return self._names[id(tensor)]


def dtype_of(name: Any) -> torch.dtype:
    """The dtype of that name.

    Raises:
        FormatError: there is none.
    """
    if not isinstance(name, str) or name not in DTYPES:
        raise FormatError(f"{name!r} is no dtype of a program; expected one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def encode_piece(piece: Piece, weights: Weights) -> dict[str, Any]:
    """The piece as a JSON value; its weights are in `weights`.

    Raises:
        NotStageable: it has an operator that a bundle does not hold; the message names it.
    """
    places: dict[fx.Node, int] = {}
    inputs, held, nodes, gives = 0, [], [], None
    for node in piece.module.graph.nodes:
        if node.op == "output":
            gives = _encode(node.args[0], places)
            continue
        places[node] = len(places)
        if node.op == "placeholder":
            inputs += 1
        elif node.op == "get_attr":
            held.append(weights.name(_weight(piece.module, str(node.target))))
        else:
            args, kwargs = _encode(list(node.args), places), {k: _encode(v, places) for k, v in node.kwargs.items()}
            nodes.append([_operator_name(node.target), args, *([kwargs] if kwargs else [])])
    return {
        "enters": [_encode_live(item) for item in piece.enters],
        "leaves": [_encode_live(item) for item in piece.leaves],
        "sizes": list(piece.sizes),
        "tap": list(piece.tap),
        "parameters": piece.parameters,
        "inputs": inputs,
        "weights": held,
        "nodes": nodes,
        "gives": gives,
    }


def decode_piece(value: Any, weights: Mapping[str, Tensor], symbols: int, device: torch.device) -> Piece:
    """The piece of a JSON value, on a device.

    Args:
        weights: by name, on the device already.
        symbols: how many lengths the sizes are made of.

    Raises:
        FormatError: the value is damaged, or asks for something that is no operator of a program.
    """
    try:
        return _decode_piece(value, weights, symbols, device)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"its program is damaged ({type(error).__name__}: {str(error)[:200]}).") from None


def _decode_piece(value: Any, weights: Mapping[str, Tensor], symbols: int, device: torch.device) -> Piece:
    enters, leaves = (tuple(_decode_live(item) for item in value[part]) for part in ("enters", "leaves"))
    sizes, tap = tuple(value["sizes"]), tuple(map(str, value["tap"]))
    compile_sizes(sizes, symbols)
    calls = value["nodes"]
    if value["inputs"] != len(enters) + len(sizes) or not 0 < len(calls) <= MOST_NODES:
        raise FormatError(f"its program has {value['inputs']} inputs and {len(calls)} calls; they do not fit together.")
    graph, root = fx.Graph(), nn.Module()
    made = [graph.placeholder(f"x{i}") for i in range(value["inputs"])]
    for i, name in enumerate(value["weights"]):
        if name not in weights:
            raise FormatError(f"its weights do not hold {name!r}.")
        _hold(root, f"w{i}", weights[name])
        made.append(graph.get_attr(f"w{i}"))
    for i, call in enumerate(calls):
        name, args, kwargs = (*call, {})[:3]
        target = _operator(name)
        args, kwargs = _decode(args, made, device), {str(k): _decode(v, made, device) for k, v in kwargs.items()}
        _check_call(name, target, args, kwargs)
        made.append(graph.create_node("call_function", target, tuple(args), kwargs, name=f"v{i}"))
    gives = _decode(value["gives"], made, device)
    many = isinstance(gives, list)
    if (not many and leaves) or (many and len(gives) != 1 + len(leaves)) or not _all_nodes(gives):
        raise FormatError("its program does not give what its carry wants.")
    graph.output(tuple(gives) if many else gives)
    parameters = int(value["parameters"])
    return Piece(fx.GraphModule(root, graph, "Piece"), enters, leaves, sizes, tap, len(calls), parameters)


def _all_nodes(gives: Any) -> bool:
    return all(isinstance(node, fx.Node) for node in (gives if isinstance(gives, list) else [gives]))


def _hold(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Nothing; the weight is the root's: as a parameter where it can be one, so that sharing outlives a cast."""
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(name, tensor)
    else:
        root.register_buffer(name, tensor, persistent=False)


def _weight(module: nn.Module, name: str) -> Tensor:
    tensor = operator.attrgetter(name)(module)
    if not isinstance(tensor, Tensor):
        raise NotStageable(
            f"the graph holds a {type(tensor).__name__}; a bundle holds tensors. Keep it out of forward."
        )
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise NotStageable(f"a weight is {tensor.dtype}; a bundle holds {', '.join(DTYPES)}. Cast it first.")
    return tensor


def _operator_name(target: Any) -> str:
    if target is operator.getitem:
        return GETITEM
    name = str(target)
    try:
        _operator(name)
    except FormatError as error:
        raise NotStageable(f"the model cannot be bundled: {error} It still runs, without a bundle.") from None
    return name


def _operator(name: Any) -> Any:
    """The operator of that name, when it is one that only computes."""
    if name == GETITEM:
        return operator.getitem
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) != 3 or parts[0] != "aten" or not all(part.isidentifier() for part in parts):
        raise FormatError(f"{str(name)[:80]!r} is no operator that a bundle may hold (aten.NAME.OVERLOAD).")
    _, base, overload = parts
    found = getattr(getattr(torch.ops.aten, base, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise FormatError(f"this torch ({torch.__version__}) has no operator {name}. Update torch.")
    schema = found._schema
    tensors = schema.returns and all("Tensor" in str(value.type) for value in schema.returns)
    if base in REFUSED or (base.startswith("_") and base not in PRIVATE) or schema.is_mutable or not tensors:
        raise FormatError(f"{name} is no operator that a bundle may hold: it does more than compute.")
    return found


def _check_call(name: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Nothing, when the arguments are as many and called as the operator's own."""
    if target is operator.getitem:
        if len(args) != 2 or kwargs or not isinstance(args[0], fx.Node) or type(args[1]) is not int:
            raise FormatError("getitem takes a value and a whole number.")
        return
    known = [argument.name for argument in target._schema.arguments]
    if len(args) > len(known) or not set(kwargs) <= set(known[len(args) :]):
        raise FormatError(f"{name} is called with arguments that it does not have.")


def _encode(value: Any, places: Mapping[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return {"v": places[value]}
    if isinstance(value, list | tuple):
        return [_encode(item, places) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": True}
    if isinstance(value, torch.memory_format):
        return {"format": str(value).removeprefix("torch.")}
    if value is torch.strided:
        return {"layout": "strided"}
    raise NotStageable(f"the model cannot be bundled: its graph holds {value!r}. It still runs, without a bundle.")


def _decode(value: Any, made: Sequence[fx.Node], device: torch.device) -> Any:
    if isinstance(value, list):
        return [_decode(item, made, device) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise FormatError(f"its program has the argument {str(value)[:80]}, which is none.")
    ((kind, what),) = value.items()
    if kind == "v" and type(what) is int and 0 <= what < len(made):
        return made[what]
    if kind == "float" and what in ("inf", "-inf", "nan"):
        return float(what)
    if kind == "dtype":
        return dtype_of(what)
    if kind == "device":
        return device
    if kind == "format" and what in FORMATS:
        return FORMATS[what]
    if kind == "layout":
        return torch.strided
    raise FormatError(f"its program has the argument {str(value)[:80]}, which is none.")


def _encode_live(item: Live) -> list[Any]:
    return [item.name, item.axis, item.multiple, list(item.shape), item.dtype]


def _decode_live(value: Any) -> Live:
    name, axis, multiple, shape, dtype = value
    if not isinstance(name, str) or not isinstance(multiple, bool) or not isinstance(dtype, str):
        raise FormatError("its carry is damaged.")
    if axis is not None and (type(axis) is not int or not 0 <= axis < len(shape)):
        raise FormatError(f"its carry has the rows of {name!r} on axis {axis!r} of {len(shape)}.")
    return Live(name, axis, multiple, tuple(map(str, shape)), dtype)
