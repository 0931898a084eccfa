"""`export`: a model, a policy and what is known of them in one ONNX file."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from offramp.artefacts import write_atomically, write_json
from offramp.bundle import Bundle
from offramp.cost import Budget
from offramp.engines import engine as engine_of
from offramp.errors import FormatError
from offramp.graph import three_rows
from offramp.onnx.about import describe
from offramp.onnx.assemble import cascade_of, visits_of
from offramp.onnx.graphs import LARGEST, with_onnx
from offramp.onnx.session import OnnxFile
from offramp.policies import Policy, to_dict
from offramp.runtime import Runtime

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["export", "export_stages_to", "save"]

STAGES = "stages.json"

#: What probabilities may differ by between engines, in float32.
FURTHEST = 1e-3


def export(
    bundle: Bundle,
    path: str | Path,
    *,
    policy: str | Policy | None = None,
    budget: Budget | None = None,
    precision: str = "fp32",
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
        precision: "fp32", "int8" (large products in 8 bits, row by row) or "int8-batch" (one scale for all rows of a
            batch, so that a row's answer depends on its neighbours). Thresholds of one precision need not hold in
            another: a warning says so.
        progress: called after every stage; they take some seconds each, the first time.

    Raises:
        NotStageable: a part of the model has no ONNX operators.
        MissingExtra: the packages onnx, onnxscript and onnxruntime are not installed.
        ValueRangeError: the bundle has no such policy, or there is no such precision.
        FormatError: the file does not answer as the model does on the bundle's example; nothing is written.
    """
    name, chosen = _chosen(bundle, policy, budget)
    choice = bundle.policies.get(name)
    found = None if choice is None else choice.calibration
    sessions = engine_of(bundle.model, "onnx", precision=precision)
    stages = sessions.graphs(progress)  # type: ignore[attr-defined]
    proto = cascade_of(bundle.model, chosen, stages=stages)
    describe(
        proto,
        {
            "policy_name": name,
            "precision": precision,
            "labels": list(bundle.labels),
            "title": bundle.title,
            "taps": list(bundle.model.taps),
            "costs": None if bundle.costs is None else list(bundle.costs.cumulative(chosen.enabled)),
            "calibration": None if found is None else {"status": found.status, "message": found.message},
            "tested": {} if choice is None else dict(choice.tested),
        },
    )
    _verify(proto, Runtime(bundle.model, chosen, sessions, calibrated=None if found is None else found.precision))
    return save(proto, path)


def export_stages_to(
    bundle: Bundle,
    folder: str | Path,
    *,
    policy: str | Policy | None = None,
    budget: Budget | None = None,
    precision: str = "fp32",
    progress: Callable[[], None] | None = None,
) -> Path:
    """The folder, after one ONNX file for each visited exit was written to it, for schedulers that regroup rows by
    themselves, over several requests say; and `stages.json`, which says what goes from one to the next.

    Visit i takes the carry and the state of the rows that are still here, and gives `stop`, `score`, `answer`, the
    state, and the carry that goes on; the last one gives `score` and `answer`. Rows that stop are taken out of every
    tensor on its axis of rows.

    Args:
        bundle, policy, budget, precision, progress: as for `export`.

    Raises:
        FormatError: the folder holds something else.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / STAGES).is_file())):
        raise FormatError(f"{folder} holds something else; give a new folder.")
    name, chosen = _chosen(bundle, policy, budget)
    stages = engine_of(bundle.model, "onnx", precision=precision).graphs(progress)  # type: ignore[attr-defined]
    visits, told = visits_of(bundle.model, chosen, stages), []
    (folder / STAGES).unlink(missing_ok=True)  # until the end nothing says that the files are whole
    for old in folder.glob("visit-*.onnx*"):
        old.unlink()
    enters = stages[0].enters
    for place, visit in enumerate(visits):
        path = folder / f"visit-{place}.onnx"
        save(visit.proto, path)
        leaves = stages[visit.k].leaves
        told.append(
            {
                "file": path.name,
                "exit": visit.k,
                "carry": [{"name": live.name, "axis": live.axis, "several_a_row": live.multiple} for live in enters],
                "inputs": list(visit.inputs),
                "outputs": list(visit.outputs),
                "states": visit.states,
                "goes_on": [
                    {"name": live.name, "from": f"{live.name} after" if at is None else enters[at].name}
                    for live, at in zip(leaves, visit.passed, strict=False)
                ],
            }
        )
        enters = leaves
    about = {"policy_name": name, "policy": to_dict(chosen), "labels": list(bundle.labels), "precision": precision}
    write_json(folder / STAGES, {"kind": "offramp.stages", "version": 1, **about, "visits": told})
    return folder


def _chosen(bundle: Bundle, policy: str | Policy | None, budget: Budget | None) -> tuple[str, Policy]:
    if isinstance(policy, str | None):
        return bundle.choose(policy, budget=budget)
    return type(policy).__name__, policy


def save(proto: "ModelProto", path: str | Path) -> Path:
    """The path, after the model was written to it; weights of models beyond 1.9 GB lie in PATH.data beside it."""
    onnx, path = with_onnx(), Path(path)
    if proto.ByteSize() < LARGEST:
        return write_atomically(path, lambda partial: _write(proto.SerializeToString(), partial))
    onnx.save_model(proto, str(path), save_as_external_data=True, location=f"{path.name}.data")
    return path


def _verify(proto: "ModelProto", run: Runtime) -> None:
    """Nothing, when the file answers three rows as its stages do one by one, and these as the model does."""
    if proto.ByteSize() >= LARGEST:
        return
    model = run.model
    inputs = three_rows(model.example)
    ours, theirs = run(inputs), OnnxFile(proto.SerializeToString())(inputs)
    if run.engine.precision == "fp32":
        ours = Runtime(model, run.policy)(inputs)
    same = ours.exit == theirs.exit  # a row at its threshold may leave elsewhere
    apart = (ours.probabilities - theirs.probabilities)[same].abs()
    if not bool(same.any()) or float(apart.max()) > FURTHEST:
        raise FormatError(
            f"the ONNX file answers the example otherwise than the model: exits {theirs.exit.tolist()} and not "
            f"{ours.exit.tolist()}, probabilities {apart.max() if len(apart) else 1.0:.2g} apart. Nothing was written."
        )


def _write(contents: bytes, path: Path) -> None:
    path.write_bytes(contents)
