"""A run directory: what was trained and how, and its weights. Read again by the command line and by quickstart.

run.json              task or own job, options, figures of the training, versions, machine, checksum of the weights;
                      the signals that the heads were taught beyond logits, if there are any
model.safetensors     every parameter and buffer of the model with exits, once
preprocess/           how a raw row becomes inputs, for own data
network/              the configuration of a transformers network
checkpoint/           the state of the training while it lasts
SPLIT.safetensors     what every exit says about the rows of a split (`offramp record`)
costs.json            what stages and heads cost (`offramp measure`)
policies/NAME.json    calibrated policies (`offramp calibrate`)
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from offramp.artefacts import read_json, write_atomically, write_json
from offramp.certainty import widen
from offramp.checkpoints import named_tensors
from offramp.errors import FormatError, OfframpError
from offramp.jobs import JOBS, Job, job
from offramp.machine import machine_line, versions
from offramp.model import MultiExitModel
from offramp.objectives import Objective, objective_to_dict
from offramp.own import SPLITS, Own, OwnJob, own_job
from offramp.preprocess import load_preprocess
from offramp.recipe import Recipe, TrainReport
from offramp.tasks import TEXT_TASKS

__all__ = [
    "RUN", "WEIGHTS", "costs_path", "held_out", "load_run", "made_from", "policies_folder", "read_run", "save_run",
    "save_signals", "trace_path",
]  # fmt: skip

KIND, VERSION = "offramp.run", 2
RUN, WEIGHTS, PREPROCESS, NETWORK, SIGNALS = "run.json", "model.safetensors", "preprocess", "network", "signals"
OPTIONS = ("epochs", "limit", "max_length", "seed", "head")  # of `job`; `data` is a matter of the machine
FIELDS = {"task", "options", "exits", "classes", "weights_sha256", "report"} | {
    "objective", "recipe", "versions", "machine", "own",
}  # fmt: skip


def save_run(
    folder: str | Path,
    task: str,
    options: Mapping[str, Any],
    model: MultiExitModel,
    report: TrainReport,
    *,
    objective: Objective | None = None,
    recipe: Recipe | None = None,
    own: OwnJob | None = None,
) -> Path:
    """The folder, after weights and `run.json` were written to it, each atomically.

    A stop between the two leaves a checksum that does not fit, which `load_run` reports.

    Args:
        task: a name in `offramp.jobs.JOBS`.
        options: of `job`, without `data`; `load_run` builds the network by them.
        objective, recipe: what was used, for the record.
        own: the job, when `task` is none of those.
    """
    folder = Path(folder)
    if own is not None:
        own.preprocess.save(folder / PREPROCESS)
        network: Any = own.network.module
        kept = folder / NETWORK / "config.json"
        if own.network.kind is not None and hasattr(network, "config"):
            write_json(kept, json.loads(network.config.to_json_string(use_diff=False)))
        else:  # made by code, not by the configuration of an earlier run
            kept.unlink(missing_ok=True)
    fields = {
        "task": task,
        "options": {name: value for name, value in options.items() if name in OPTIONS and value is not None},
        "exits": model.exits,
        "classes": model.classes,
        "weights_sha256": _save_weights(folder, model),
        "report": report.to_dict(),
        "objective": None if objective is None else objective_to_dict(objective),
        "recipe": None if recipe is None else recipe.describe(),
        "versions": versions(),
        "machine": machine_line(),
        "own": None if own is None else dataclasses.asdict(own.own),
    }
    return _save_fields(folder, fields, model.signals)


def save_signals(folder: str | Path, model: MultiExitModel) -> Path:
    """The folder of a run, after the model's signals and the weights that give them were written to it.

    Both files are replaced in one rename each; what else the run says of itself stays.

    Raises:
        FormatError: there is no finished run.
    """
    folder = Path(folder)
    fields = read_run(folder)
    return _save_fields(folder, {**fields, "weights_sha256": _save_weights(folder, model)}, model.signals)


def _save_fields(folder: Path, fields: Mapping[str, Any], signals: tuple[str, ...]) -> Path:
    """The folder; runs without signals do not name any, as those of before there were any."""
    value = {name: field for name, field in fields.items() if name != SIGNALS}
    if signals:
        value[SIGNALS] = list(signals)
    write_json(folder / RUN, {"kind": KIND, "version": VERSION, "fields": value})
    return folder


def _save_weights(folder: Path, model: MultiExitModel) -> str:
    """The checksum of the weights, after they were written."""
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in named_tensors(model)}
    checksum = ""

    def write(partial: Path) -> None:
        nonlocal checksum
        save_file(tensors, partial, metadata={"kind": KIND})
        checksum = _sha256(partial)  # here, so that no time goes by between the new weights and their new checksum

    write_atomically(folder / WEIGHTS, write)
    return checksum


def read_run(folder: str | Path) -> dict[str, Any]:
    """The fields of `run.json`, checked.

    Raises:
        FormatError: there is no finished run, or the file is damaged, foreign or from a newer version.
    """
    folder = Path(folder)
    path = folder / RUN
    if not path.is_file():
        state = "it does not exist" if not folder.exists() else "it has no run.json"
        hint = "Train one first: offramp train TASK --out RUN."
        if (folder / "checkpoint").is_dir():
            hint = "Its training was stopped; the same `offramp train` command goes on with it."
        raise FormatError(f"{folder} is not a run: {state}. {hint}")
    value = read_json(path)
    if value.get("kind") != KIND:
        raise FormatError(f"{path} is a {value.get('kind')!r}; expected {KIND!r}. Give a folder that train wrote.")
    if value.get("version") not in (1, VERSION):
        raise FormatError(f"{path} is a run of version {value.get('version')!r}; this Offramp reads {VERSION}. Update.")
    fields = value.get("fields")
    if isinstance(fields, dict) and value["version"] == 1:  # runs had no data of their own then
        fields = {**fields, "own": None}
    if isinstance(fields, dict):
        fields = {SIGNALS: [], **fields}
    if not isinstance(fields, dict) or set(fields) != {*FIELDS, SIGNALS} or not isinstance(fields["options"], dict):
        raise FormatError(f"{path} is damaged: its fields are not those of a run. Train again.")
    if fields["own"] is None and (fields["task"] not in JOBS or not set(fields["options"]) <= set(OPTIONS)):
        raise FormatError(
            f"{path} is of the task {fields['task']!r} with options {sorted(fields['options'])}; "
            f"expected one of {', '.join(JOBS)}, with {', '.join(OPTIONS)}. Train again."
        )
    if fields["own"] is None and fields["task"] in TEXT_TASKS:
        fields["options"] = {"head": "mean", **fields["options"]}  # as in runs of before heads could be named
    if fields[SIGNALS] not in ([], ["certainty"]):
        raise FormatError(f"{path} has the signals {fields[SIGNALS]}; this Offramp knows 'certainty'. Update.")
    return fields


def load_run(folder: str | Path, *, data: str | Path | None = None) -> tuple[Job, MultiExitModel, Any]:
    """(job, model in eval mode, tokenizer or None) of a finished run.

    Args:
        data: the folder of data sets that the job loads splits from; None asks the hub.

    Raises:
        FormatError: there is no finished run, or a file of it is damaged, foreign or from a newer version.
        MissingExtra: the network needs a package that is not installed.
    """
    folder = Path(folder)
    fields = read_run(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise FormatError(f"{weights} does not exist, though {RUN} does. Copy the whole folder, or train again.")
    if _sha256(weights) != fields["weights_sha256"]:
        raise FormatError(
            f"{weights} does not have the checksum in {RUN}: it is damaged, or another run's. "
            "Copy the whole folder again, or train again."
        )
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{weights} is not a readable safetensors file: {error}. Train again.") from None
    work = _job_of(folder, fields, data)
    model, tokenizer = work.build()
    if fields[SIGNALS]:
        widen(model, tuple(fields[SIGNALS]))
    _fill(model, tensors, weights)
    return work, model.eval(), tokenizer


def _job_of(folder: Path, fields: Mapping[str, Any], data: str | Path | None) -> Job:
    if fields["own"] is not None:
        own = Own.of(fields["own"])
        # the data have moved, and their fingerprint is checked; the variable names a folder of named tasks, not these
        if data is not None and str(data) != os.environ.get("OFFRAMP_DATA") and not Path(own.data).exists():
            own = dataclasses.replace(own, data=str(data))
        return own_job(own, load_preprocess(folder / PREPROCESS), folder / NETWORK)
    try:
        return job(fields["task"], data=data, **fields["options"])
    except (OfframpError, TypeError) as error:
        raise FormatError(f"{folder / RUN} has options that make no job: {error} Train again.") from None


def trace_path(folder: str | Path, split: str) -> Path:
    """Where the trace of a split of a run is kept."""
    return Path(folder) / f"{split}.safetensors"


def costs_path(folder: str | Path) -> Path:
    """Where the costs of a run are kept."""
    return Path(folder) / "costs.json"


def policies_folder(folder: str | Path) -> Path:
    """Where the calibrated policies of a run are kept."""
    return Path(folder) / "policies"


def made_from(folder: str | Path) -> list[Path]:
    """The traces, costs and policies in a folder, all made from its weights and stale after another training."""
    folder = Path(folder)
    traces = [path for path in sorted(folder.glob("*.safetensors")) if path.name != WEIGHTS]
    policies = sorted(policies_folder(folder).glob("*.json"))
    return [path for path in (*traces, costs_path(folder), *policies) if path.exists()]


def held_out(folder: str | Path) -> tuple[str, str]:
    """(the split to calibrate on, the split to test on) of a run; the same name means halves of one split.

    Raises:
        FormatError: there is no finished run.
    """
    fields = read_run(folder)
    return SPLITS[1:] if fields["own"] is not None else job(fields["task"], **fields["options"]).splits[1:]  # type: ignore[return-value]


def _fill(model: MultiExitModel, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Nothing; the tensors are copied into the model, which must have the same names and shapes."""
    places = dict(named_tensors(model))
    missing, foreign = sorted(set(places) - set(tensors)), sorted(set(tensors) - set(places))
    wrong = [
        f"{name} is {list(tensors[name].shape)}, expected {list(place.shape)}"
        for name, place in places.items()
        if name in tensors and tensors[name].shape != place.shape
    ]
    if missing or foreign or wrong:
        told = [*wrong, *(f"{name} is missing" for name in missing), *(f"{name} is foreign" for name in foreign)]
        raise FormatError(
            f"{path} does not fit the task's network: {'; '.join(told[:3])}{' ...' if len(told) > 3 else ''}. "
            "It is from another version of Offramp or of the network's package; train again."
        )
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(tensors[name])


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
