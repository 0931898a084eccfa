"""What `predict` runs: a bundle, or a run as a bundle in memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from offramp.cli.options import device_of, open_run, read_policy, usage
from offramp.cli.show import note
from offramp.errors import FormatError

if TYPE_CHECKING:
    from offramp.bundle import Bundle, Choice
    from offramp.calibrate import Calibration
    from offramp.jobs import Job
    from offramp.policies import Policy
    from offramp.runtime import Runtime
    from offramp.trace import ExitTrace

__all__ = [
    "Opened", "Picked", "choice_of", "choices_of", "chosen", "fit_trace", "is_bundle", "open_target", "picked",
    "run_as_bundle",
]  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """A bundle, and for a run its job, its tokenizer and the name of the label column."""

    bundle: "Bundle"
    work: "Job | None" = None
    tokenizer: Any = None
    label: str | None = None


def is_bundle(path: Path) -> bool:
    """Whether a folder holds a bundle."""
    return (path / "manifest.json").is_file()


def open_target(path: Path, data: Path | None, device: str) -> Opened:
    """The bundle or the run in a folder.

    Raises:
        FormatError: it is neither, or damaged.
    """
    if is_bundle(path):
        from offramp.bundle import Bundle

        bundle = Bundle.load(path, device=device_of(device))
        label = bundle.about.get("label")
        return Opened(bundle, label=label if isinstance(label, str) else None)
    if path.is_dir() and not (path / "run.json").is_file() and not (path / "checkpoint").is_dir():
        raise FormatError(f"{path} is neither a bundle nor a run: it has no manifest.json and no run.json.")
    return run_as_bundle(path, data, device)


def run_as_bundle(run: Path, data: Path | None, device: str) -> Opened:
    """A run with its policies and costs as a bundle in memory."""
    from offramp.bundle import Bundle
    from offramp.cost import CostModel
    from offramp.preprocess import TextPreprocess
    from offramp.runs import costs_path, read_run
    from offramp.tasks import TEXT_TASKS

    work, model, tokenizer = open_run(run, data, device)
    fields = read_run(run)
    preprocess = work.preprocess
    if preprocess is None and tokenizer is not None:
        length = fields["options"].get("max_length", 128)
        preprocess = TextPreprocess.of(tokenizer, TEXT_TASKS[work.name].columns, length)
    costs = CostModel.load(costs_path(run)) if costs_path(run).is_file() else None
    bundle = Bundle(
        model,
        labels=work.labels or tuple(map(str, range(model.classes))),
        policies=choices_of(run, costs, model.exits),
        costs=costs if costs is None or costs.exits == model.exits else None,
        preprocess=preprocess,
        title=work.name,
    )
    own = fields["own"]
    return Opened(bundle, work, tokenizer, "label" if own is None else own["label"])


def choices_of(run: Path, costs: Any, exits: int) -> "dict[str, Choice]":
    """The policies of a run by name, with what its calibration rows look like to them where these are recorded."""
    from offramp.runs import policies_folder

    paths = sorted(policies_folder(run).glob("*.json")) if policies_folder(run).is_dir() else []
    trace = fit_trace(run, exits) if paths and costs is not None else None
    return {path.stem: choice_of(path, trace) for path in paths}


def choice_of(path: Path, trace: "ExitTrace | None") -> "Choice":
    """The policy in a file, with what calibration rows look like to it where these are given."""
    from offramp.bundle import Choice
    from offramp.check import reference

    policy, calibration = read_policy(path)
    known = None if trace is None else reference(policy, trace)
    return Choice(policy, calibration, None if known is None else known.shares, reference=known)


def fit_trace(run: Path, exits: int) -> "ExitTrace | None":
    """What every exit says about the calibration rows of a run, or None when that is not recorded."""
    from offramp.runs import held_out, trace_path
    from offramp.trace import ExitTrace

    path = trace_path(run, held_out(run)[0])
    trace = ExitTrace.load(path) if path.is_file() else None
    return trace if trace is not None and trace.exits == exits else None


def chosen(
    opened: Opened, policy: str | None, fraction: float | None, ms: float | None, batch_size: int, *,
    engine: str = "eager", precision: str | None = None, threads: int | None = None,
) -> "tuple[str, Runtime]":  # fmt: skip
    """(name, runtime) of the policy that the options name, on an engine."""
    from offramp.runtime import Runtime

    found = picked(opened, policy, fraction, ms, batch_size)
    if found.inside:
        return found.name, opened.bundle.runtime(found.name, engine=engine, precision=precision, threads=threads)
    return found.name, Runtime(
        opened.bundle.model, found.policy, engine, precision=precision, threads=threads,
        calibrated=None if found.calibration is None else found.calibration.precision,
    )  # fmt: skip


class Picked(NamedTuple):
    """The policy that options name; `inside` says that the bundle has it under that name, or else it is of a file."""

    name: str
    policy: "Policy"
    inside: bool = True
    calibration: "Calibration | None" = None


def picked(opened: Opened, policy: str | None, fraction: float | None, ms: float | None, batch_size: int) -> Picked:
    """The policy that the options name."""
    from offramp.cost import Budget

    given = [
        name for name, value in (("--policy", policy), ("--fraction", fraction), ("--ms", ms)) if value is not None
    ]
    if len(given) > 1:
        raise usage(f"got {' and '.join(given)}; give one of them.")
    bundle = opened.bundle
    is_file = policy is not None and (Path(policy).suffix == ".json" or Path(policy).is_file())
    if policy is not None and policy not in bundle.names and is_file:
        value, calibration = read_policy(Path(policy))
        return Picked(Path(policy).stem, value, False, calibration)
    budget = None
    if fraction is not None or ms is not None:
        budget = Budget(fraction=fraction, ms=ms, batch_size=batch_size)
    if not given and not bundle.policies and opened.work is not None:
        raise usage("--policy is missing: the run has no calibrated policies. See `offramp calibrate`, or give plain.")
    name, found = bundle.choose(policy, budget=budget)
    if not given and len(bundle.names) > 2:
        note(f"policy: {name} (the default; there are {', '.join(bundle.names)})")
    return Picked(name, found)
