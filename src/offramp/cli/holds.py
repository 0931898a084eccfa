"""What a file or a run holds, in a few words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from offramp.artefacts import kind_of, read_json
from offramp.errors import FormatError

__all__ = ["holds"]


def holds(path: Path) -> dict[str, Any]:
    """What a run, trace, cost model, policy or calibration holds, by name.

    Raises:
        FormatError: the path does not exist, is damaged, or is none of these.
    """
    if not path.exists():
        raise FormatError(f"{path} does not exist. Check the path.")
    if path.is_dir():
        return (
            {"kind": "bundle", **_bundle(path)} if (path / "manifest.json").is_file() else {"kind": "run", **_run(path)}
        )
    if path.suffix == ".safetensors":
        return {"kind": "trace", **_trace(path)}
    if path.suffix == ".onnx":
        return {"kind": "ONNX file", **_onnx(path)}
    from offramp.policies import FAMILIES

    kind = kind_of(read_json(path))
    readers: dict[Any, tuple[str, Callable[[Path], dict[str, Any]]]] = {
        "offramp.costs": ("costs", _costs),
        "offramp.calibration": ("calibration", _policy),
        "offramp.report": ("report", _report),
        "offramp.bundle": ("bundle", lambda file: _bundle(file.parent)),
        "offramp.run": ("run", lambda file: _run(file.parent)),
        **dict.fromkeys(FAMILIES, ("policy", _policy)),
    }
    if kind not in readers:
        raise FormatError(
            f"{path} is of kind {kind!r}; expected a bundle, run, trace, costs, report or policy of Offramp."
        )
    name, read = readers[kind]
    return {"kind": name, **read(path)}


def _bundle(folder: Path) -> dict[str, Any]:
    from offramp.bundle import Bundle
    from offramp.bundle.store import read_manifest

    if read_manifest(folder).fields.get("generates"):
        return _texts(folder)
    bundle = Bundle.load(folder)
    value: dict[str, Any] = {
        "title": bundle.title or "not told",
        "labels": bundle.labels,
        "exits": bundle.model.exits,
        "takes": "tensors" if bundle.preprocess is None else bundle.preprocess.kind,
        "columns": "none" if bundle.preprocess is None else bundle.preprocess.columns,
        "default": bundle.default,
    }
    for name, choice in bundle.policies.items():
        asked = "" if choice.calibration is None else f", {choice.calibration.message}"
        tested = choice.tested.get("accuracy")
        value[name] = type(choice.policy).__name__ + asked
        if isinstance(tested, int | float):
            value[f"{name}, tested"] = f"{tested:.4f} right on {choice.tested.get('rows')} rows"
    return value | {
        "weights_mb": sum(file.stat().st_size for file in folder.iterdir()) / 1e6,
        **bundle.about,
        **_engines(bundle.model),
    }


def _texts(folder: Path) -> dict[str, Any]:
    from offramp.generation import TokenBundle

    bundle = TokenBundle.load(folder)
    model, rule, draft = bundle.model, bundle.policy, bundle.draft
    return {
        "network": type(model.backbone).__name__,
        "takes": "texts" if bundle.preprocess is None else "images",
        "layers": model.decoder.layers,
        "exits behind layers": [*(j + 1 for j in model.at), model.decoder.layers],
        "heads": model.made["head"],
        "vocabulary": model.classes,
        "context": model.decoder.context,
        "policy": "none" if rule is None else type(rule.policy).__name__,
        "draft": "none" if draft is None else f"{draft.tokens} tokens of exit {draft.exit + 1}",
        "weights_mb": sum(file.stat().st_size for file in folder.iterdir()) / 1e6,
        **(bundle.about or {}),
    }


def _engines(model: Any) -> dict[str, Any]:
    """What can run a model here, and with which threads."""
    from offramp.cache import cache_folder
    from offramp.engines import about_engines

    return {f"engine {name}": told for name, told in about_engines(model).items()} | {"cache": str(cache_folder())}


def _onnx(path: Path) -> dict[str, Any]:
    from offramp.onnx import read_about

    about = read_about(path)
    found = about.get("calibration")
    return {
        "title": about.get("title") or "not told",
        "labels": about.get("labels", ()),
        "exits": about["exits"],
        "visited": about["visited"],
        "policy": about["policy"]["kind"],
        "calibration": "none" if found is None else found["message"],
        "opset": about["opset"],
        "megabytes": path.stat().st_size / 1e6,
        "versions": about["versions"],
    }


def _report(path: Path) -> dict[str, Any]:
    from offramp.report import Report

    report = Report.load(path)
    return {"title": report.title, "headline": report.headline(), "detail": report.detail(), "machine": report.machine}


def _run(folder: Path) -> dict[str, Any]:
    from offramp.runs import WEIGHTS, read_run

    fields = read_run(folder)
    report = fields["report"]
    epochs = report["epochs"]
    weights = folder / WEIGHTS
    return {
        "task": fields["task"],
        "options": fields["options"],
        "exits": fields["exits"],
        "classes": fields["classes"],
        "epochs": len(epochs),
        "loss": epochs[-1]["loss"],
        "accuracy": epochs[-1]["accuracy"] or "not measured",
        "seconds": report["seconds"],
        "weights_mb": weights.stat().st_size / 1e6 if weights.is_file() else "missing",
        "versions": fields["versions"],
        "machine": fields["machine"],
    }


def _trace(path: Path) -> dict[str, Any]:
    from offramp.trace import ExitTrace

    trace = ExitTrace.load(path)
    return {
        "source": trace.source or "not told",
        "rows": trace.rows,
        "exits": trace.exits,
        "classes": trace.classes,
        "accuracy": "no labels" if trace.labels is None else trace.accuracy(),
        "signals": 0 if trace.signals is None else trace.signals.shape[2],
        "precision": trace.precision,
    }


def _costs(path: Path) -> dict[str, Any]:
    from offramp.cost import CostModel

    costs = CostModel.load(path)
    return {
        "exits": costs.exits,
        "cumulative": costs.cumulative(),
        "plain_flops": "not counted" if costs.plain_flops is None else costs.plain_flops,
        "plain_ms": {str(t.batch_size): 1000 * t.plain_s for t in costs.timed} or "not measured",
        "measured_with": f"{costs.engine} {costs.precision}",
        "machine": costs.machine or "not told",
    }


def _policy(path: Path) -> dict[str, Any]:
    from offramp.cli.options import read_policy

    policy, calibration = read_policy(path)
    value: dict[str, Any] = {"family": type(policy).__name__}
    for name in ("thresholds", "weights", "patience", "enabled"):
        found = getattr(policy, name, None)
        if isinstance(found, int | float | tuple):
            value[name] = found
    if calibration is not None:
        value |= {
            "target": str(calibration.target),
            "achieved": calibration.achieved,
            "status": calibration.status,
            "message": calibration.message,
            "rows": calibration.rows,
            "precision": calibration.precision,
        }
    return value
