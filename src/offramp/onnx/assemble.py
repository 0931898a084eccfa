"""ONNX models put together from stages and steps: one with all exits inside, or one for each visit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from offramp.cut import Live
from offramp.errors import ShapeError
from offramp.machine import versions
from offramp.model import ExitModel
from offramp.onnx.about import VERSION, describe
from offramp.onnx.cascade import Cascade, Weights, joined, model_of, needed
from offramp.onnx.graphs import LARGEST, OPSET, StageGraph, StepGraph, export_stages, export_steps, with_onnx
from offramp.policies import Policy, to_dict
from offramp.policies.base import at_exit, check_exits, check_signals, visits
from offramp.stages import Parts
from offramp.units import parts_of

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["VisitGraph", "cascade_of", "parted", "visits_of"]


@dataclass(frozen=True, eq=False)
class VisitGraph:
    """Everything up to one visited exit: (carry, state) -> stop, score, answer, state, carry; the last visit gives
    score and answer alone.

    Args:
        k: the exit.
        proto: the graph.
        inputs: their names: the carry, then the state.
        outputs: their names.
        states: how many tensors of state there are among them.
        passed: for each value that goes on, which value of the carry that came in it is, or None where it is made here.
    """

    k: int
    proto: "ModelProto"
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    states: int
    passed: tuple[int | None, ...]


def cascade_of(
    model: ExitModel,
    policy: Policy,
    *,
    stages: Sequence[StageGraph] | None = None,
    progress: Callable[[], None] | None = None,
) -> "ModelProto":
    """The ONNX model of a model under a policy, checked; see `export`.

    Args:
        model: from `attach`.
        policy: for the same number of exits; one of ours, or one that stops where `score >= thresholds`.
        stages: from `export_stages`, when several policies are exported for one model.

    Raises:
        NotStageable: a part of the model has no ONNX operators.
        ShapeError: the policy is for another number of exits, or needs signals that the model does not have.
    """
    if not isinstance(model, ExitModel):
        raise ShapeError(f"the model is {type(model).__name__}; expected what attach(...) returned.")
    check_exits(policy, model.exits)
    check_signals(policy, model.signals)
    onnx = with_onnx()
    parts = parts_of(model)
    thresholds = [at_exit(policy.thresholds, k) for k in range(model.exits)]  # type: ignore[attr-defined]
    stages = export_stages(model, progress) if stages is None else stages
    proto = joined(stages, export_steps(model, policy), _inputs(parts), thresholds, model.classes)
    describe(
        proto,
        {
            "version": VERSION,
            "exits": model.exits,
            "classes": model.classes,
            "visited": list(visits(policy, model.exits)),
            "policy": to_dict(policy),
            "opset": OPSET,
            "lengths": _ranges(parts),
            "versions": versions(),
        },
    )
    if proto.ByteSize() < LARGEST:
        onnx.checker.check_model(proto)
    return proto


def visits_of(model: ExitModel, policy: Policy, stages: Sequence[StageGraph]) -> tuple[VisitGraph, ...]:
    """One graph for each exit that a policy visits, for a scheduler of one's own, or one session each.

    Args:
        model, policy: as for `cascade_of`.
        stages: from `export_stages`.

    Raises:
        NotStageable: a step of the policy has no ONNX operators.
    """
    steps = export_steps(model, policy)
    found, carry, state = [], _infos(stages[0].enters), ()
    for place, step in enumerate(steps):
        graph, state = _visit(model, policy, stages, steps, place, carry, state)
        found.append(graph)
        carry = _infos(stages[step.k].leaves)
    return tuple(found)


def _visit(
    model: ExitModel, policy: Policy, stages: Sequence[StageGraph], steps: Sequence[StepGraph], place: int,
    carry: Sequence[Any], state: Sequence[Any],
) -> tuple[VisitGraph, tuple[Any, ...]]:  # fmt: skip
    """(the graph of one visit, what its state is)."""
    helper = with_onnx().helper
    weights, step, last = Weights(), steps[place], place == len(steps) - 1
    names = [info.name for info in (*carry, *state)]
    nodes, (score, answer, *after), live = Cascade(stages, steps, weights).visit(
        place, names[: len(carry)], names[len(carry) :]
    )
    pairs = [(score, "score"), (answer, "answer")]
    kinds = list(step.proto.graph.output[:2])
    passed: list[int | None] = []
    if not last:
        weights.number("threshold", at_exit(policy.thresholds, step.k), "float32")  # type: ignore[attr-defined]
        nodes.append(helper.make_node("GreaterOrEqual", [score, "threshold"], ["stops"]))
        pairs = [("stops", "stop"), *pairs, *((value, f"state {i} after") for i, value in enumerate(after))]
        stop = helper.make_tensor_value_info("stop", with_onnx().TensorProto.BOOL, ["batch"])
        kinds = [stop, *kinds, *step.proto.graph.output[2:]]
        inside = {name: i for i, name in enumerate(names[: len(carry)])}
        passed = [inside.get(value) for value in live]
        for value, info, at in zip(live, _infos(stages[step.k].leaves), passed, strict=True):
            if at is None:
                pairs.append((value, f"{info.name} after"))
                kinds.append(info)
    nodes += [helper.make_node("Identity", [value], [name]) for value, name in pairs]
    outs = [_called(kind, name) for kind, (_, name) in zip(kinds, pairs, strict=True)]
    graph = helper.make_graph(nodes, f"exit {step.k}", [*carry, *state], outs, list(weights.tensors.values()))
    proto = model_of(graph)
    found = tuple(_called(info, f"state {i}") for i, info in enumerate(step.proto.graph.output[2:]))
    visit = VisitGraph(
        step.k, proto, tuple(names), tuple(name for _, name in pairs), 0 if last else len(after), tuple(passed)
    )
    return visit, found


def parted(graph: StageGraph) -> "tuple[ModelProto, ModelProto | None]":
    """(a stage without its head, its head alone), for timing each; None behind the last exit, which has no head.

    The first gives the carry and then what the second reads, both in the order of their inputs.
    """
    if not graph.leaves:
        return graph.proto, None
    said = 1 + graph.signals
    onnx = with_onnx()
    whole = onnx.shape_inference.infer_shapes(graph.proto).graph
    known = {info.name: info for info in (*whole.value_info, *whole.input, *whole.output)}
    outs = [o.name for o in whole.output]
    body, read = needed(whole.node, outs[said:])
    inside = {name for node in body for name in node.output}
    tail = [node for node in needed(whole.node, outs[:said])[0] if not inside & set(node.output)]
    made = {name for node in tail for name in node.output}
    fixed = {tensor.name: tensor for tensor in whole.initializer}
    reads = dict.fromkeys(name for node in tail for name in node.input if name and name not in made)
    border = [name for name in reads if name not in fixed]
    body, read = needed(whole.node, [*outs[said:], *border])  # what is only for the border, such as the last norm
    helper = onnx.helper
    stage = helper.make_graph(
        body, "stage", list(whole.input), [known[name] for name in dict.fromkeys((*outs[said:], *border))],
        [fixed[name] for name in fixed if name in read],
    )  # fmt: skip
    head = helper.make_graph(
        tail, "head", [known[name] for name in border], list(whole.output[:said]),
        [fixed[name] for name in reads if name in fixed],
    )  # fmt: skip
    return model_of(stage), model_of(head)


def _infos(lives: Sequence[Live]) -> tuple[Any, ...]:
    """What a carry is, as the inputs of a graph."""
    helper = with_onnx().helper
    return tuple(
        helper.make_tensor_value_info(
            live.name,
            helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=getattr(torch, live.dtype)).numpy().dtype),
            [int(word) if word.isdigit() else word for word in live.shape],
        )
        for live in lives
    )


def _called(info: Any, name: str) -> Any:
    copy = type(info)()
    copy.CopyFrom(info)
    copy.name = name
    return copy


def _inputs(parts: Parts) -> list[tuple[str, Any, Sequence[Any]]]:
    """Name, numpy dtype and axes of every input of the network."""
    words = ["batch", *(f"n{i}" for i in range(1, len(parts.ranges)))]
    kinds = [torch.empty(0, dtype=dtype).numpy().dtype for dtype in parts.dtypes]
    axes = [[length if isinstance(length, int) else words[length[0]] for length in entry] for entry in parts.axes]
    return list(zip(parts.names, kinds, axes, strict=True))


def _ranges(parts: Parts) -> dict[str, list[int | None]]:
    """Least and greatest length of every named axis but the batch; None for no limit."""
    named = enumerate(parts.ranges)
    return {f"n{i}": [least, most if most < 2**61 else None] for i, (least, most) in named if i}
