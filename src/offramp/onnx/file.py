"""`export`: a model, a policy and what is known of them in one ONNX file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offramp.artefacts import write_atomically
from offramp.bundle import Bundle
from offramp.cost import Budget
from offramp.errors import FormatError, ShapeError
from offramp.graph import three_rows
from offramp.machine import versions
from offramp.model import ExitModel
from offramp.onnx.about import VERSION, describe
from offramp.onnx.cascade import joined
from offramp.onnx.graphs import OPSET, StageGraph, export_stages, export_steps, parts_of, with_onnx
from offramp.onnx.session import OnnxFile, with_runtime
from offramp.policies import Policy, to_dict
from offramp.policies.base import at_exit, check_exits, visits
from offramp.runtime import Runtime, check_signals
from offramp.stages import Parts

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["cascade_of", "export", "save"]

#: protobuf holds no more than 2 GiB; weights of larger models lie beside the file.
LARGEST = 1_900_000_000
#: What probabilities may differ by between engines, in float32.
FURTHEST = 1e-3


def export(
    bundle: Bundle,
    path: str | Path,
    *,
    policy: str | Policy | None = None,
    budget: Budget | None = None,
    progress: Callable[[], None] | None = None,
) -> Path:
    """The path, after stages, heads, policy and regrouping were written to it as one ONNX file.

    The file needs onnxruntime and nothing else, in Python, Node or the browser. Inputs are those of the network, with
    any number of rows, and `thresholds`, float32 [exit], which may be left out: the policy's own are the default, so
    that one file serves every threshold. Rows that are done leave the batch inside the graph.

        label, probabilities, exit, score = InferenceSession("film.onnx").run(None, inputs)

    Args:
        bundle: what to export.
        policy, budget: which policy of it, as for `Bundle.choose`; or a policy value.
        progress: called after every visited exit; they take some seconds each.

    Raises:
        NotStageable: a part of the model has no ONNX operators.
        MissingExtra: the packages onnx, onnxscript and onnxruntime are not installed.
        ValueRangeError: the bundle has no such policy.
        FormatError: the file does not answer as the model does on the bundle's example; nothing is written.
    """
    if isinstance(policy, str | None):
        name, chosen = bundle.choose(policy, budget=budget)
    else:
        name, chosen = type(policy).__name__, policy
    with_runtime()
    proto = cascade_of(bundle.model, chosen, progress=progress)
    choice = bundle.policies.get(name)
    found = None if choice is None else choice.calibration
    describe(
        proto,
        {
            "policy_name": name,
            "labels": list(bundle.labels),
            "title": bundle.title,
            "taps": list(bundle.model.taps),
            "costs": None if bundle.costs is None else list(bundle.costs.cumulative(chosen.enabled)),
            "calibration": None if found is None else {"status": found.status, "message": found.message},
            "tested": {} if choice is None else dict(choice.tested),
        },
    )
    _verify(proto, bundle.model, chosen)
    return save(proto, path)


def cascade_of(
    model: ExitModel,
    policy: Policy,
    *,
    stages: Sequence[StageGraph] | None = None,
    progress: Callable[[], None] | None = None,
) -> "ModelProto":
    """The ONNX model of a model under a policy, checked; see `export`.

    Args:
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


def save(proto: "ModelProto", path: str | Path) -> Path:
    """The path, after the model was written to it; weights of models beyond 1.9 GB lie in PATH.data beside it."""
    onnx, path = with_onnx(), Path(path)
    if proto.ByteSize() < LARGEST:
        return write_atomically(path, lambda partial: _write(proto.SerializeToString(), partial))
    onnx.save_model(proto, str(path), save_as_external_data=True, location=f"{path.name}.data")
    return path


def _verify(proto: "ModelProto", model: ExitModel, policy: Policy) -> None:
    """Nothing, when the file answers three rows as the runtime does."""
    if proto.ByteSize() >= LARGEST:
        return
    inputs = three_rows(model.example)
    ours, theirs = Runtime(model, policy)(inputs), OnnxFile(proto.SerializeToString())(inputs)
    same = ours.exit == theirs.exit  # a row at its threshold may leave elsewhere
    apart = (ours.probabilities - theirs.probabilities)[same].abs()
    if not bool(same.any()) or float(apart.max()) > FURTHEST:
        raise FormatError(
            f"the ONNX file answers the example otherwise than the model: exits {theirs.exit.tolist()} and not "
            f"{ours.exit.tolist()}, probabilities {apart.max() if len(apart) else 1.0:.2g} apart. Nothing was written."
        )


def _write(contents: bytes, path: Path) -> None:
    path.write_bytes(contents)


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
