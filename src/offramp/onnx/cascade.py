"""One ONNX graph with the exits inside: visits nested in `If`, and only the rows that go on in the inner ones.

    visit 0 -> score, answer, state, carry
    on = not (score >= thresholds[0])
    If any(on):  rows = nonzero(on)
                 the same for the next visit, on carry[rows] and state[rows]
                 answer, exit, score = scatter of what came back into those rows

A row's answer is what it would be alone, because every stage and every policy works row by row.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from offramp.errors import NotStageable
from offramp.onnx.graphs import OPSET, StageGraph, StepGraph, with_onnx

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

__all__ = ["Cascade", "Weights", "inlined", "joined", "model_of", "needed"]

#: What goes with opset 20 (ONNX 1.15), so that no newer reader is asked for than the operators need.
IR_VERSION = 9
THRESHOLDS = "thresholds"


class Weights:
    """Initialisers of several graphs, each kept once: by kind, shape and contents.

    onnxruntime packs a weight for its products where it lies in the graph of the product or one above. So what a single
    visit uses lies in that visit's graph, and only what several share lies outermost (measured at batch 1: six nested
    MiniLM layers take 1.3 times as long with all weights outermost).

    Attributes:
        tensors: what lies outermost.
        place: of the visit that `add` is called for.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}
        self.place = 0
        self._names: dict[tuple[Any, ...], str] = {}
        self._users: dict[str, set[int]] = {}

    def add(self, tensor: "TensorProto") -> str:
        """The name under which a tensor is kept."""
        from onnx import numpy_helper

        array = numpy_helper.to_array(tensor)
        key = (tensor.data_type, tuple(tensor.dims), hashlib.sha256(array.tobytes()).digest())
        if key not in self._names:
            name = f"w{len(self._names)}"
            kept = type(tensor)()
            kept.CopyFrom(tensor)
            kept.name = name
            self.tensors[name], self._names[key] = kept, name
        name = self._names[key]
        self._users.setdefault(name, set()).add(self.place)
        return name

    def take(self, place: int) -> list[Any]:
        """The tensors that one visit alone uses; they lie outermost no more."""
        return [self.tensors.pop(name) for name, users in self._users.items() if users == {place}]

    def number(self, name: str, value: Any, dtype: Any = np.int64) -> str:
        """The name of a constant of ours."""
        from onnx import numpy_helper

        self.tensors.setdefault(name, numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name


class Cascade:
    """Nodes of the nested graphs; names are made unique by the exit they belong to."""

    def __init__(self, stages: Sequence[StageGraph], steps: Sequence[StepGraph], weights: Weights) -> None:
        from onnx import helper

        self.stages = stages
        self.steps = steps
        self.weights = weights
        self.node: Callable[..., NodeProto] = helper.make_node
        self.axis = weights.number("axis 0", [0])
        self.last_axis = weights.number("axis 1", [1])
        self.zero = weights.number("nothing", 0)

    def run(self, place: int, carry: Sequence[str], state: Sequence[str]) -> tuple[list[Any], tuple[str, str, str]]:
        """(nodes, (answer, exit, score)) of the rows whose carry and state are called so, from a visit on."""
        step, self.weights.place = self.steps[place], place
        name = f"exit {step.k}/"
        nodes, (score, answer, *state), carry = self.visit(place, carry, state)
        number = self.weights.number(f"{name}number", [step.k])
        nodes += [
            self.node("Shape", [score], [f"{name}rows"]),
            self.node("Expand", [number, f"{name}rows"], [f"{name}exit"]),
        ]
        here = (answer, f"{name}exit", score)
        if place == len(self.steps) - 1:
            return nodes, here
        at = self.weights.number(f"{name}place", step.k)
        nodes += [
            self.node("Gather", [THRESHOLDS, at], [f"{name}threshold"], axis=0),
            self.node("GreaterOrEqual", [score, f"{name}threshold"], [f"{name}stop"]),
            self.node("Not", [f"{name}stop"], [f"{name}on"]),
            self.node("NonZero", [f"{name}on"], [f"{name}where"]),
            self.node("Squeeze", [f"{name}where", self.axis], [f"{name}index"]),
            self.node("Size", [f"{name}index"], [f"{name}left"]),
            self.node("Greater", [f"{name}left", self.zero], [f"{name}any"]),
        ]
        outs = tuple(f"{name}{what} of all" for what in ("answer", "exit", "score"))
        further = self._further(place, carry, state, here)
        nodes.append(
            self.node("If", [f"{name}any"], list(outs), then_branch=further, else_branch=self._done(name, here))
        )
        return nodes, outs  # type: ignore[return-value]

    def visit(
        self, place: int, carry: Sequence[str], state: Sequence[str]
    ) -> tuple[list[Any], tuple[str, ...], list[str]]:
        """(nodes, (score, answer, state ...), carry) of the stages up to a visited exit and the step there."""
        step = self.steps[place]
        nodes, said, carry = self._to(place, carry)
        found, outs = inlined(step.proto, [*said, *state], f"exit {step.k}/policy/", self.weights)
        return [*nodes, *found], outs, list(carry)

    def _to(self, place: int, carry: Sequence[str]) -> tuple[list[Any], list[str], list[str]]:
        """(nodes, logits and the signals that the policy wants, carry) of the stages up to a visited exit."""
        step = self.steps[place]
        first = self.steps[place - 1].k + 1 if place else 0
        nodes: list[Any] = []
        for stage in self.stages[first : step.k + 1]:
            visited = stage.k == step.k
            count = 1 + stage.signals
            wanted = [visited, *[visited and step.signals] * stage.signals, *[True] * len(stage.leaves)]
            found, outs = inlined(stage.proto, carry, f"exit {stage.k}/stage/", self.weights, wanted)
            nodes += found
            said, carry = [o for o, w in zip(outs[:count], wanted, strict=False) if w], list(outs[count:])
        return nodes, said, list(carry)

    def _further(self, place: int, carry: Sequence[str], state: Sequence[str], here: tuple[str, str, str]) -> Any:
        """The branch in which some rows go on."""
        k = self.steps[place].k
        name, nodes = f"exit {k}/", []
        kept: list[str] = []
        for value, live in zip(carry, self.stages[k].leaves, strict=True):
            if live.axis is None:
                kept.append(value)
                continue
            kept.append(f"{name}{live.name} of the rest")
            nodes += self._chosen(value, kept[-1], live.axis, live.multiple, name)
        known = []
        for number, value in enumerate(state):
            known.append(f"{name}state {number} of the rest")
            nodes += self._chosen(value, known[-1], 0, False, name)
        inner, found = self.run(place + 1, kept, known)
        nodes += [*inner, self.node("Unsqueeze", [f"{name}index", self.last_axis], [f"{name}places"])]
        outs = []
        for what, old, new in zip(("answer", "exit", "score"), here, found, strict=True):
            outs.append(f"{name}{what} joined")
            nodes.append(self.node("ScatterND", [old, f"{name}places", new], [outs[-1]]))
        return self._branch(f"{name}on", nodes, outs, self.weights.take(place + 1))

    def _done(self, name: str, here: tuple[str, str, str]) -> Any:
        """The branch in which all rows have left."""
        outs = [f"{name}{what} kept" for what in ("answer", "exit", "score")]
        return self._branch(
            f"{name}off", [self.node("Identity", [x], [y]) for x, y in zip(here, outs, strict=True)], outs
        )

    def _branch(self, name: str, nodes: list[Any], outs: Sequence[str], weights: Sequence[Any] = ()) -> Any:
        from onnx import TensorProto, helper

        kinds = (TensorProto.FLOAT, TensorProto.INT64, TensorProto.FLOAT)
        infos = [helper.make_tensor_value_info(o, kind, None) for o, kind in zip(outs, kinds, strict=True)]
        return helper.make_graph(nodes, name, [], infos, list(weights))

    def _chosen(self, value: str, to: str, axis: int, multiple: bool, name: str) -> list[Any]:
        """Nodes that take the rows that go on out of a value; `multiple`: several entries of the axis are a row."""
        index = f"{name}index"
        if not multiple:
            return [self.node("Gather", [value, index], [to], axis=axis)]
        head = self.weights.number(f"first {axis}", [axis])
        behind = self.weights.number(f"first {axis + 1}", [axis + 1])
        none = self.weights.number("none", np.zeros(0))
        end, minus = self.weights.number("end", [2**31]), self.weights.number("fit", [-1])
        p = f"{to}/"
        return [
            self.node("Shape", [value], [f"{p}shape"]),
            self.node("Slice", [f"{p}shape", self.axis, head, self.axis], [f"{p}before"])
            if axis
            else self.node("Identity", [none], [f"{p}before"]),
            self.node("Slice", [f"{p}shape", behind, end, self.axis], [f"{p}after"]),
            self.node("Concat", [f"{p}before", f"{name}rows", minus, f"{p}after"], [f"{p}apart"], axis=0),
            self.node("Reshape", [value, f"{p}apart"], [f"{p}rows apart"]),
            self.node("Gather", [f"{p}rows apart", index], [f"{p}rows kept"], axis=axis),
            self.node("Concat", [f"{p}before", minus, f"{p}after"], [f"{p}together"], axis=0),
            self.node("Reshape", [f"{p}rows kept", f"{p}together"], [to]),
        ]


def joined(
    stages: Sequence[StageGraph],
    steps: Sequence[StepGraph],
    inputs: Sequence[tuple[str, Any, Sequence[Any]]],
    thresholds: Sequence[float],
    classes: int,
) -> "ModelProto":
    """One model of all stages and steps.

    Its inputs are those of the network and `thresholds`, float32 [exit], which may be left out. Its outputs, in the
    order of the input's rows: `label` int64 [batch], `probabilities` float32 [batch cls], `exit` int64 [batch] from 0,
    `score` float32 [batch].

    Args:
        inputs: of the network: name, numpy dtype, lengths or names of axes.
        thresholds: one for each exit, the defaults.
    """
    onnx = with_onnx()
    helper, kind = onnx.helper, onnx.TensorProto
    weights = Weights()
    made = Cascade(stages, steps, weights)
    nodes, (answer, exit_, score) = made.run(0, [live.name for live in stages[0].enters], ())
    nodes += [
        helper.make_node("ArgMax", [answer], ["label"], axis=-1, keepdims=0),
        helper.make_node("Softmax", [answer], ["probabilities"], axis=-1),
        helper.make_node("Identity", [exit_], ["exit"]),
        helper.make_node("Identity", [score], ["score"]),
    ]
    weights.number(THRESHOLDS, list(thresholds), np.float32)
    info = helper.make_tensor_value_info
    ins = [info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape)) for name, dtype, shape in inputs]
    outs = [
        info("label", kind.INT64, ["batch"]),
        info("probabilities", kind.FLOAT, ["batch", classes]),
        info("exit", kind.INT64, ["batch"]),
        info("score", kind.FLOAT, ["batch"]),
    ]
    graph = helper.make_graph(
        nodes, "offramp", [*ins, info(THRESHOLDS, kind.FLOAT, [len(thresholds)])], outs, list(weights.tensors.values())
    )
    return model_of(graph)


def model_of(graph: Any) -> "ModelProto":
    """The model of a graph, in the operator set that all of ours are written in."""
    helper = with_onnx().helper
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="offramp"
    )


def inlined(
    proto: "ModelProto", given: Sequence[str], prefix: str, weights: Weights, wanted: Sequence[bool] | None = None
) -> tuple[list[Any], tuple[str, ...]]:
    """(nodes, names of the outputs) of a graph whose inputs are called `given`, its initialisers in `weights`.

    Args:
        wanted: which outputs are; what is only there for others is left out.
    """
    graph = proto.graph
    if proto.functions or any(o.domain not in ("", "ai.onnx") for o in proto.opset_import):
        raise NotStageable("a part of the model needs operators beyond ONNX's own; it cannot be in one file.")
    asked = [o.name for o, want in zip(graph.output, wanted or [True] * len(graph.output), strict=True) if want]
    kept, read = needed(graph.node, asked)
    names: dict[str, str] = {"": ""}
    names |= {value.name: name for value, name in zip(graph.input, given, strict=True)}
    names |= {tensor.name: weights.add(tensor) for tensor in graph.initializer if tensor.name in read}
    return _renamed(kept, names, prefix, weights), tuple(names.get(o.name, prefix + o.name) for o in graph.output)


def needed(nodes: Sequence[Any], asked: Sequence[str]) -> tuple[list[Any], set[str]]:
    """(the nodes that give what is asked, in order; the names of all that is read)."""
    read, kept = set(asked), []
    for node in reversed(nodes):
        if read & set(node.output):
            kept.append(node)
            read.update(node.input)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    read |= needed(attribute.g.node, [o.name for o in attribute.g.output])[1]
    return kept[::-1], read


def _renamed(nodes: Iterable[Any], names: dict[str, str], prefix: str, weights: Weights) -> list[Any]:
    """Copies of nodes with other names of values, and without notes on where they come from."""
    found = []
    for node in nodes:
        copy = type(node)()
        copy.CopyFrom(node)
        del copy.metadata_props[:]
        copy.doc_string = ""
        copy.name = f"{prefix}{node.name}"
        for output in node.output:
            names.setdefault(output, prefix + output)
        copy.input[:] = [names.get(value, prefix + value) for value in node.input]
        copy.output[:] = [names[value] for value in node.output]
        for attribute in copy.attribute:
            attribute.doc_string = ""
            if attribute.HasField("g"):
                inner = dict(names) | {tensor.name: weights.add(tensor) for tensor in attribute.g.initializer}
                moved = _renamed(attribute.g.node, inner, prefix, weights)
                del attribute.g.node[:], attribute.g.initializer[:], attribute.g.value_info[:]
                attribute.g.node.extend(moved)
                for value in (*attribute.g.input, *attribute.g.output):
                    value.name = inner.get(value.name, prefix + value.name)
        found.append(copy)
    return found
