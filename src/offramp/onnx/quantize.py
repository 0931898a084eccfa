"""Products of stages in 8-bit whole numbers: `quantized(stages, "int8")`, in which every row is still on its own.

    scale = max |x| over the features of one token (or of one row, where there are no tokens) / 127
    q     = round(x / scale) + 128                uint8
    y     = (q - 128) @ w  *  weight's scale [features out]  *  scale

The scale of a token is read off that token alone, so an answer never depends on the neighbours in the batch, and no
calibration is needed. Weights have 7 bits: without VNNI, processors add pairs of products in 16 bits, and
2 * 255 * 127 does not fit. All operators are ONNX's own.
"""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offramp.errors import ValueRangeError
from offramp.onnx.cascade import needed
from offramp.onnx.graphs import LARGEST, StageGraph, with_onnx
from offramp.onnx.session import with_runtime

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["PRECISIONS", "quantized", "quantized_proto"]

#: "fp32" as exported; "int8" row by row; "int8-batch" with one scale for the whole batch, onnxruntime's dynamic kind.
PRECISIONS = ("fp32", "int8", "int8-batch")
#: Smaller products stay float: heads and classifiers have few columns, and there is nothing to gain (measured).
LEAST = 64
#: Of whole numbers: activations, weights (pairs of products must fit 16 bits), entries of a table, the middle of uint8.
MOST, MOST_WEIGHT, MOST_ENTRY, MIDDLE = 127, 63, 127, 128
#: Scales are not smaller, so that columns of zeros divide.
TINY = 1e-30


def quantized(stages: Sequence[StageGraph], precision: str) -> tuple[StageGraph, ...]:
    """The stages with their large products in a precision; see `quantized_proto`. The given ones are not changed.

    Args:
        stages: from `export_stages`.
        precision: one of `PRECISIONS`.

    Raises:
        ValueRangeError: there is no such precision.
        MissingExtra: the packages onnx and onnxruntime are not installed.
    """
    _check(precision)
    return tuple(replace(stage, proto=quantized_proto(stage.proto, precision)) for stage in stages)


def quantized_proto(proto: "ModelProto", precision: str) -> "ModelProto":
    """A graph with its large products in a precision; the same graph where that changes nothing. Convolutions stay
    float.

    "int8" gives each token (each row, where there are none) a scale of its own, so that answers do not depend on
    neighbours, and keeps tables of embeddings in 8 bits too. "int8-batch" is onnxruntime's `quantize_dynamic`: one
    scale over the whole batch, so that a row's answer depends on which rows are with it.

    Args:
        proto: a graph of opset 18 or later.
        precision: one of `PRECISIONS`.

    Raises:
        ValueRangeError: there is no such precision.
        MissingExtra: the packages onnx and onnxruntime are not installed.
    """
    _check(precision)
    if precision == "fp32":
        return proto
    with_onnx()
    made = _apart(proto)
    products = _products(made.graph)
    if precision == "int8-batch":
        return _by_batch(made, products) if products else proto
    rows = _Rows(made.graph)
    for output in products:
        rows.product(output)
    for output in _lookups(made.graph):
        rows.lookup(output)
    return rows.written(made) if rows.replaced else proto


def _check(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueRangeError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")


class _Rows:
    """Nodes that take the place of others, by the output that they give, and the constants that they need."""

    def __init__(self, graph: Any) -> None:
        self.given = {tensor.name: tensor for tensor in graph.initializer}
        self.nodes = {node.output[0]: node for node in graph.node}
        self.replaced: dict[str, list[Any]] = {}
        self._constants: dict[str, Any] = {}
        self._scaled: set[str] = set()

    def product(self, output: str) -> None:
        """The product of whole numbers instead of a MatMul."""
        from onnx import TensorProto, helper

        node, p = self.nodes[output], f"{output}/int8 "
        x, make = node.input[0], helper.make_node
        rows = f"{x}/int8 "
        weight, scale = _whole(self._array(node.input[1]), 0, MOST_WEIGHT)
        middle = self._constant("middle", np.uint8(MIDDLE))
        nodes = [] if x in self._scaled else self._scale(x, rows, middle)  # Q, K and V have one input
        self._scaled.add(x)
        self.replaced[output] = [
            *nodes,
            make("MatMulInteger", [f"{rows}whole", self._constant(f"{p}weight", weight), middle], [f"{p}sum"]),
            make("Cast", [f"{p}sum"], [f"{p}float"], to=TensorProto.FLOAT),
            make("Mul", [f"{p}float", self._constant(f"{p}scale", scale[0])], [f"{p}columns"]),
            make("Mul", [f"{p}columns", f"{rows}scale"], [output]),
        ]

    def lookup(self, output: str) -> None:
        """Rows of an 8-bit table instead of a Gather; every entry of the table has its own scale."""
        from onnx import TensorProto, helper

        node, p = self.nodes[output], f"{output}/int8 "
        table, at = node.input
        whole, scale = _whole(self._array(table), 1, MOST_ENTRY)
        make = helper.make_node
        self.replaced[output] = [
            make("Gather", [self._constant(f"{table}/int8 table", whole), at], [f"{p}whole"]),
            make("Gather", [self._constant(f"{table}/int8 scale", scale), at], [f"{p}scale"]),
            make("Cast", [f"{p}whole"], [f"{p}float"], to=TensorProto.FLOAT),
            make("Mul", [f"{p}float", f"{p}scale"], [output]),
        ]

    def written(self, proto: "ModelProto") -> "ModelProto":
        """The graph with the new nodes, and without the weights that nothing reads any more."""
        graph = proto.graph
        for new in (new for nodes in self.replaced.values() for new in nodes):
            new.name = f"node of {new.output[0]}"  # onnxruntime refuses two of one name, and prefixes make one of none
        nodes = [new for node in graph.node for new in self.replaced.get(node.output[0], [node])]
        _, read = needed(nodes, [output.name for output in graph.output])
        kept = [*(t for name, t in self.given.items() if name in read), *self._constants.values()]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend(kept)
        return proto

    def _scale(self, x: str, rows: str, middle: str) -> list[Any]:
        """Nodes that give a value's scales and its whole numbers."""
        from onnx import helper

        last, one = self._constant("last axis", np.array([-1])), self._constant("one", np.float32(1))
        share, none = self._constant("share", np.float32(1 / MOST)), self._constant("none", np.float32(0))
        make = helper.make_node
        return [
            make("Abs", [x], [f"{rows}size"]),
            make("ReduceMax", [f"{rows}size", last], [f"{rows}most"], keepdims=1),
            make("Mul", [f"{rows}most", share], [f"{rows}share"]),
            # ReduceMax passes over NaN, and no whole number is NaN: 0 * sum keeps it, so that answers show it
            make("ReduceSum", [x, last], [f"{rows}total"], keepdims=1),
            make("Mul", [f"{rows}total", none], [f"{rows}nothing"]),
            make("Add", [f"{rows}share", f"{rows}nothing"], [f"{rows}scale"]),
            # zeros divided by a scale of zero become some whole number, which the scale makes zero again
            make("Div", [x, f"{rows}scale"], [f"{rows}even"]),
            make("QuantizeLinear", [f"{rows}even", one, middle], [f"{rows}whole"]),
        ]

    def _constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        name = f"int8/{name}"
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _array(self, name: str) -> np.ndarray:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.given[name])


def _whole(weight: np.ndarray, axis: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(int8 numbers, float32 scales) of a weight; one scale for what lies along an axis, which keeps length 1."""
    scale = np.maximum(np.abs(weight).max(axis=axis, keepdims=True) / most, TINY).astype(np.float32)
    return np.rint(weight / scale).clip(-most, most).astype(np.int8), scale


def _by_batch(proto: "ModelProto", products: Sequence[str]) -> "ModelProto":
    """What onnxruntime makes of it; it only writes files, and says much."""
    with_runtime()
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    for node in proto.graph.node:
        node.name = f"node of {node.output[0]}"
    wanted = [f"node of {output}" for output in products]
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "made.onnx"
            quantize_dynamic(
                proto, path, op_types_to_quantize=["MatMul"], nodes_to_quantize=wanted,
                use_external_data_format=proto.ByteSize() > LARGEST, extra_options={"MatMulConstBOnly": True},
            )  # fmt: skip
            return onnx.load(path)
    finally:
        logging.getLogger().setLevel(level)


def _apart(proto: "ModelProto") -> "ModelProto":
    """A copy in which `Gemm` with a large weight is a product and a sum, without notes on shapes, which mislead."""
    from onnx import helper, numpy_helper

    made = type(proto)()
    made.CopyFrom(proto)
    graph = made.graph
    del graph.value_info[:]
    given, nodes = {tensor.name: tensor for tensor in graph.initializer}, []
    for node in graph.node:
        how = {a.name: helper.get_attribute_value(a) for a in node.attribute} if node.op_type == "Gemm" else {}
        plain = how.get("alpha", 1.0) == how.get("beta", 1.0) == 1.0 and not how.get("transA", 0)
        if node.op_type != "Gemm" or not plain or not _large(given.get(node.input[1])):
            nodes.append(node)
            continue
        output, weight = node.output[0], node.input[1]
        if how.get("transB", 0):
            weight = f"{weight}/across"
            if weight not in given:
                turned = np.ascontiguousarray(numpy_helper.to_array(given[node.input[1]]).T)
                given[weight] = numpy_helper.from_array(turned, weight)
        biased = len(node.input) > 2 and bool(node.input[2])
        product = f"{output}/product" if biased else output
        nodes.append(helper.make_node("MatMul", [node.input[0], weight], [product], name=f"node of {product}"))
        if biased:
            nodes.append(helper.make_node("Add", [product, node.input[2]], [output], name=f"node of {output}"))
    _, read = needed(nodes, [output.name for output in graph.output])
    kept = [tensor for name, tensor in given.items() if name in read]
    fresh = type(graph)(node=nodes, initializer=kept)
    del graph.node[:], graph.initializer[:]
    graph.MergeFrom(fresh)
    return made


def _products(graph: Any) -> list[str]:
    """Outputs of the products with a large constant."""
    given = {tensor.name: tensor for tensor in graph.initializer}
    return [n.output[0] for n in graph.node if n.op_type == "MatMul" and _large(given.get(n.input[1]))]


def _lookups(graph: Any) -> list[str]:
    """Outputs of the look-ups in a large table."""
    given = {tensor.name: tensor for tensor in graph.initializer}
    return [
        node.output[0]
        for node in graph.node
        if node.op_type == "Gather" and _large(given.get(node.input[0])) and not any(a.i for a in node.attribute)
    ]


def _large(tensor: Any) -> bool:
    """Whether a constant is a matrix of floats worth it."""
    from onnx import TensorProto

    return (
        tensor is not None
        and tensor.data_type == TensorProto.FLOAT
        and len(tensor.dims) == 2
        and min(tensor.dims) >= LEAST
    )
