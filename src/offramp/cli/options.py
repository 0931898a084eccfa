"""Options that several commands share, and what their words mean."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.errors import ValueRangeError, first_line

if TYPE_CHECKING:
    from offramp.calibrate import Calibration
    from offramp.jobs import Job
    from offramp.model import MultiExitModel
    from offramp.objectives import Objective

__all__ = [
    "BatchSizeOption",
    "CertifyOption",
    "ConfidenceOption",
    "CostsOption",
    "DataOption",
    "DeltaOption",
    "DeviceOption",
    "DropOption",
    "EngineOption",
    "EpochsOption",
    "EpsilonOption",
    "ErrorRateOption",
    "Family",
    "FlopsOption",
    "FractionOption",
    "Gradients",
    "JsonOption",
    "LimitOption",
    "Loss",
    "Metric",
    "MsOption",
    "PartOption",
    "PolicyOption",
    "PrecisionOption",
    "Prefer",
    "PreferOption",
    "RiskLoss",
    "RiskLossOption",
    "RiskMethod",
    "RiskMethodOption",
    "RunArgument",
    "SeedOption",
    "TargetArgument",
    "Task",
    "ThreadsOption",
    "TraceArgument",
    "check_out",
    "device_of",
    "image_size",
    "names_in",
    "objective_of",
    "open_run",
    "read_policy",
    "split_name",
    "usage",
    "whole_numbers",
]


# Written out, because asking the modules that own the names would load torch for `--help`; tests compare them.
class Task(StrEnum):
    """Names of `offramp.jobs.JOBS`."""

    digits = "digits"
    cifar10 = "cifar10"
    cifar100 = "cifar100"
    tiny_imagenet = "tiny_imagenet"
    sst2 = "sst2"
    rte = "rte"
    cola = "cola"
    mrpc = "mrpc"
    qnli = "qnli"
    qqp = "qqp"
    mnli = "mnli"
    wnli = "wnli"
    ag_news = "ag_news"


class Family(StrEnum):
    """Names of `offramp.compare.CHOICES`."""

    max_prob = "max-prob"
    entropy = "entropy"
    margin = "margin"
    patience = "patience"
    f_pabee = "f-pabee"
    pcee = "pcee"
    voting = "voting"
    msdnet = "msdnet"
    beem_c = "beem-c"
    beem_a = "beem-a"
    eenet = "eenet"
    ztw = "ztw"
    jei_dnn = "jei-dnn"
    berxit = "berxit"
    accuracy_bins = "accuracy-bins"
    eero = "eero"
    fixed = "fixed"
    stopping = "stopping"


class Metric(StrEnum):
    """Names of `offramp.metrics.METRICS`."""

    accuracy = "accuracy"
    balanced_accuracy = "balanced-accuracy"
    macro_f1 = "macro-f1"
    f1 = "f1"
    matthews = "matthews"


class RiskLoss(StrEnum):
    """Losses of `offramp.calibrate.Risk`."""

    drop = "drop"
    disagreement = "disagreement"
    signed_drop = "signed drop"


class RiskMethod(StrEnum):
    """Methods of `offramp.calibrate.Risk`."""

    auto = "auto"
    ltt = "ltt"
    betting = "betting"
    crc = "crc"
    plain = "plain"


class Prefer(StrEnum):
    """What `offramp.calibrate.Joint` prefers."""

    cheapest = "cheapest"
    safest = "safest"


class Gradients(StrEnum):
    """Values of `offramp.Recipe.gradients`."""

    sum = "sum"
    equilibrium = "equilibrium"
    local = "local"
    detached = "detached"


class Loss(StrEnum):
    """Names of objectives; distill needs a teacher besides the data."""

    depth = "depth"
    uniform = "uniform"
    eenet = "eenet"
    self_distill = "self-distill"
    distill = "distill"
    final_only = "final-only"
    two_stage = "two-stage"
    alternating = "alternating"
    plain_first = "plain-first"


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `offramp train` wrote.")]
TraceArgument = Annotated[
    Path, typer.Argument(metavar="RUN_OR_TRACE", help="A run that was recorded and measured, or a trace file.")
]
TargetArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE_OR_RUN", help="A folder of `offramp bundle create` or `offramp train`.")
]
PolicyOption = Annotated[
    str | None, typer.Option(help="A policy's name in the bundle, plain for none, or a file.", show_default=False)
]
PartOption = Annotated[
    float | None, typer.Option(help="The policy that spends at most this part of the plain model's cost.")
]
EngineOption = Annotated[
    str, typer.Option("--engine", help="What runs the stages: eager, compiled, onnx, or onnx-file.")
]
PrecisionOption = Annotated[
    str | None,
    typer.Option("--precision", help="fp32, bf16, int8 or int8-batch; the model's own unless given."),
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="For one call; as torch unless given.")]
DataOption = Annotated[
    Path | None,
    typer.Option(
        envvar="OFFRAMP_DATA", help="Folder of data sets, DIR/TASK/SPLIT.parquet; without it, the hub is asked."
    ),
]
EpochsOption = Annotated[int | None, typer.Option(min=1, help="Passes over the data, instead of the recipe's.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use at most so many training rows.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Of weights, order and augmentation.")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Rows at once.")]
CostsOption = Annotated[
    Path | None, typer.Option(help="A file that `offramp measure` wrote for the same run; RUN/costs.json by default.")
]
DeltaOption = Annotated[float, typer.Option(help="For --risk: the chance that the promise does not hold.")]
RiskLossOption = Annotated[RiskLoss, typer.Option("--loss", help="What --risk is of.")]
RiskMethodOption = Annotated[RiskMethod, typer.Option("--method", help="How --risk is certified.")]
CertifyOption = Annotated[
    Path | None, typer.Option(help="For --risk: a trace that nothing was fitted on; by default half of TRACE.")
]
MsOption = Annotated[float | None, typer.Option(help="Budget: milliseconds a batch of --batch-size rows.")]
FlopsOption = Annotated[float | None, typer.Option(help="Budget: FLOPs a row.")]
FractionOption = Annotated[
    str | None,
    typer.Option(help="Budget: this part of the plain model's cost; several with commas, or FIRST:LAST:STEP."),
]
PreferOption = Annotated[
    Prefer | None, typer.Option(help="With a budget and --risk: the cheapest within the risk, or the safest.")
]
EpsilonOption = Annotated[
    float | None, typer.Option("--risk", help="Promise: new rows lose at most this, e.g. 0.01; also with a budget.")
]
DropOption = Annotated[
    float | None,
    typer.Option(help="No budget: the cheapest that loses at most this on the calibration rows, e.g. 0.01."),
]
ErrorRateOption = Annotated[
    bool, typer.Option("--error-rate", help="No budget: rows that leave early err no more than the final exit.")
]
ConfidenceOption = Annotated[
    float | None, typer.Option(help="For --error-rate: ask it with this confidence, e.g. 0.95.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU when there is one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON on standard output and nothing else there.")]


def usage(message: str) -> typer.BadParameter:
    """The error to raise for options that do not go together (exit code 2)."""
    return typer.BadParameter(message)


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """The whole numbers in "1,8,32"."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise usage(f"{option} is {text!r}; expected whole numbers of at least 1 with commas, e.g. 1,8,32.")
    return numbers


def names_in(text: str | None) -> tuple[str, ...] | None:
    """The names in "a,b"; None for None."""
    if text is None:
        return None
    names = tuple(part.strip() for part in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise usage(f"{text!r} is no list of names; expected different names with commas, e.g. title,body.")
    return names


def image_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) of "32" or "32x48"; None for None."""
    if text is None:
        return None
    try:
        sides = [int(part) for part in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise usage(f"--image-size is {text!r}; expected SIDE or HEIGHTxWIDTH in pixels, e.g. 32 or 32x48.")
    return sides[0], sides[-1]


def check_out(path: Path, *, folder: bool = False) -> Path:
    """The path, when something can be written there: found out before the work, not after it.

    Args:
        folder: the path itself is to be a folder; otherwise a file.

    Raises:
        OSError: nothing can be written there.
    """
    if not folder and path.is_dir():
        raise IsADirectoryError(21, "is a folder; expected the name of a file to write", str(path))
    parent = path if folder else path.parent
    parent.mkdir(parents=True, exist_ok=True)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(13, "the folder cannot be written to. Choose another with --out", str(parent))
    return path


def open_run(run: Path, data: Path | None, device: str) -> tuple["Job", "MultiExitModel", Any]:
    """(job, model on the device in eval mode, tokenizer or None)."""
    from offramp.runs import load_run

    place = device_of(device)
    work, model, tokenizer = load_run(run, data=data)
    return work, model.to(place), tokenizer


def device_of(device: str) -> Any:
    """The torch.device of that name; "auto" is a GPU when there is one.

    Raises:
        ValueRangeError: it cannot be used.
    """
    import torch

    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        place = torch.device(name)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueRangeError(
            f"the device {device!r} cannot be used: {first_line(error, 120).rstrip('.')}. Use --device cpu."
        ) from None
    return place


def split_name(work: "Job", split: str) -> str:
    """The name of the split in the data; "calibrate" stands for the split that the task calibrates on."""
    return work.splits[1] if split == "calibrate" else split


def read_policy(path: Path) -> tuple[Any, "Calibration | None"]:
    """(policy, the calibration it came from or None), from a file of `offramp calibrate` or of `dumps`.

    Raises:
        FormatError: the file is missing, damaged, or holds something else.
    """
    from offramp.artefacts import kind_of, read_json
    from offramp.calibrate import Calibration
    from offramp.errors import FormatError
    from offramp.policies import FAMILIES, from_dict

    kind = kind_of(read_json(path))
    if kind in FAMILIES:
        return from_dict(read_json(path)), None
    if kind != "offramp.calibration":
        raise FormatError(f"{path} is of kind {kind!r} and no policy. Give a file that `offramp calibrate` wrote.")
    found = Calibration.load(path)
    return found.policy, found


def objective_of(loss: Loss) -> "Objective":
    """The objective that a name on the command line stands for."""
    from offramp import objectives as o

    made: dict[Loss, Objective] = {
        Loss.depth: o.DepthWeighted(),
        Loss.uniform: o.Uniform(),
        Loss.eenet: o.EENetLoss(),
        Loss.self_distill: o.SelfDistill(),
        Loss.distill: o.Distill(),
        Loss.final_only: o.FinalOnly(),
        Loss.two_stage: o.TwoStage(),
        Loss.alternating: o.Alternating(),
        Loss.plain_first: o.TwoStage(o.FinalOnly(), o.Distill(), freeze=False),
    }
    return made[loss]
