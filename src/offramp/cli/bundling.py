"""`offramp bundle`: create one from a run, and verify one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.opening import Opened, choice_of, fit_trace, run_as_bundle
from offramp.cli.options import DataOption, DeviceOption, JsonOption, RunArgument, device_of, usage
from offramp.cli.show import note, percent, result

if TYPE_CHECKING:
    from offramp.bundle import Bundle

__all__ = ["app", "create", "verify"]

app = typer.Typer(help="A run as a folder that runs elsewhere, without the training code.", no_args_is_help=True)

ROWS = 256  # test rows that are timed


@app.command("create", epilog="Example: offramp bundle create runs/reviews --out reviews.offramp")
def create(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="The folder of the bundle; an older bundle there is replaced.")],
    policy: Annotated[
        list[str] | None, typer.Option(help="A policy of the run by name, or a file; all of the run's by default.")
    ] = None,
    default: Annotated[
        str | None, typer.Option(help="The policy that runs when none is named; found by timing them by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="The size at which policies are timed.")] = 1,
    timing: Annotated[
        bool, typer.Option(help="Time every policy live, and make plain the default if none pays.")
    ] = True,
    title: Annotated[str | None, typer.Option(help="A line for readers.")] = None,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    json_out: JsonOption = False,
) -> None:
    """Write stages, heads, weights, policies, costs, labels and preprocessing of a run into one folder.

    The folder holds data only: no pickle and no code. With it, `offramp predict` and `Bundle.load` need neither the
    training code nor the data.
    """
    opened = run_as_bundle(run, data, device)
    bundle = _with(run, opened.bundle, policy, default, title)
    tested = _tested(run, bundle)
    if timing and bundle.policies and default is None:
        bundle = _timed(opened, bundle, tested, batch_size)
    about = _about(run, opened)
    from dataclasses import replace

    policies = {name: replace(choice, tested=tested.get(name, {})) for name, choice in bundle.policies.items()}
    bundle = replace(bundle, policies=policies, about=about)
    path = bundle.save(out)
    size = sum(file.stat().st_size for file in path.iterdir())
    value = {
        "out": str(path),
        "bytes": size,
        "policies": list(bundle.names),
        "default": bundle.default,
        "tested": tested,
    }
    lines = [f"policies: {', '.join(bundle.names)}; {bundle.default} runs when none is named",
             f"wrote {path}, {size / 1e6:.1f} MB; next: offramp predict {path}"]  # fmt: skip
    result(value, lines, json_out)


@app.command("verify", epilog="Example: offramp bundle verify reviews.offramp")
def verify(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder of `offramp bundle create`.")],
    device: DeviceOption = "cpu",
    json_out: JsonOption = False,
) -> None:
    """Check every file of a bundle, and that its model answers here as it did where it was written."""
    from offramp.bundle import Bundle

    bundle = Bundle.load(path, device=device_of(device))
    value = {"bundle": str(path), "good": True, "exits": bundle.model.exits, "labels": list(bundle.labels),
             "policies": list(bundle.names), "default": bundle.default}  # fmt: skip
    labels = ", ".join(bundle.labels[:6]) + (f" and {len(bundle.labels) - 6} more" if len(bundle.labels) > 6 else "")
    result(
        value,
        (f"{path} is good: its files are whole, and its example is answered as where it was written",
         f"{bundle.model.exits} exits, labels {labels}; policies {', '.join(bundle.names)}"),
        json_out,
    )  # fmt: skip


def _with(run: Path, bundle: "Bundle", policy: list[str] | None, default: str | None, title: str | None) -> "Bundle":
    """The bundle with the policies that were asked for."""
    from dataclasses import replace

    from offramp.bundle import Choice

    policies: dict[str, Choice] = dict(bundle.policies)
    if policy:
        policies = {}
        for name in policy:
            if name in bundle.policies:
                policies[name] = bundle.policies[name]
            elif Path(name).suffix == ".json":
                policies[Path(name).stem] = choice_of(Path(name), fit_trace(run, bundle.model.exits))
            else:
                known = ", ".join(bundle.policies) or "none"
                raise usage(f"--policy is {name!r}; the run has {known}. Give one of them, or a .json file.")
    if not policies:
        note("warning: the run has no calibrated policies; the bundle answers with the plain model alone.")
    if default is not None and default not in (*policies, "plain"):
        raise usage(f"--default is {default!r}; expected one of {', '.join((*policies, 'plain'))}.")
    return replace(bundle, policies=policies, default=default, title=bundle.title if title is None else title)


def _tested(run: Path, bundle: "Bundle") -> dict[str, dict[str, Any]]:
    """What each policy does on the run's test rows, when these were recorded; never on rows it was fitted on."""
    from offramp.metrics import accuracy_interval
    from offramp.runs import held_out, trace_path
    from offramp.simulate import simulate
    from offramp.trace import ExitTrace

    fit, test = held_out(run)
    path = trace_path(run, test)
    if bundle.costs is None or fit == test or not path.is_file():
        note("note: without a test trace and costs the bundle does not say what its policies do on rows never seen.")
        return {}
    trace = ExitTrace.load(path)
    found = {}
    for name, choice in bundle.policies.items():
        outcome = simulate(choice.policy, trace, bundle.costs)
        if outcome.accuracy is None:
            continue
        low, high = accuracy_interval(round(outcome.accuracy * trace.rows), trace.rows)
        found[name] = {
            "rows": trace.rows, "cost": outcome.cost, "accuracy": outcome.accuracy, "low": low, "high": high,
            "plain": trace.accuracy()[-1], "shares": list(outcome.shares),
        }  # fmt: skip
    return found


def _timed(opened: Opened, bundle: "Bundle", tested: dict[str, dict[str, Any]], batch_size: int) -> "Bundle":
    """The bundle with the default that pays: the fastest policy not worse than plain beyond chance, or plain."""
    from dataclasses import replace

    from offramp.loaders import as_loader
    from offramp.timing import time_policies

    work = opened.work
    if work is None:
        return bundle
    rows = work.load(work.splits[2], opened.tokenizer)
    size = min(batch_size, len(rows))
    batches = []
    for batch in as_loader(rows, size):
        if len(batch.rows) == size:
            batches.append(batch.inputs)
        if len(batches) * size >= ROWS:
            break
    note(f"timing {len(bundle.policies)} policies at batch {size} ...")
    policies = {name: choice.policy for name, choice in bundle.policies.items()}
    speeds = {s.policy: s for s in time_policies(bundle.model, policies, batches, costs=bundle.costs, seconds=10.0)}
    for name, speed in speeds.items():
        tested.setdefault(name, {})["speedup"] = {
            "batch_size": size, "times": speed.speedup, "plain_ms": speed.plain_ms, "policy_ms": speed.policy_ms,
        }  # fmt: skip
        found = tested[name]
        right = f", {percent(found['accuracy'])} right (plain {percent(found['plain'])})" if "accuracy" in found else ""
        note(f"  {name}: {speed.speedup:.2f} times as fast as plain{right}")
    good = [name for name in speeds if tested[name].get("high", 1.0) >= tested[name].get("plain", 0.0)]
    best = max(good, key=lambda name: speeds[name].speedup, default=None)
    if best is None or speeds[best].speedup <= 1.0:
        note("warning: no policy pays here, so plain is the default; another batch size or machine may differ.")
        return replace(bundle, default="plain")
    return replace(bundle, default=best)


def _about(run: Path, opened: Opened) -> dict[str, Any]:
    """What the bundle says about where it comes from."""
    from offramp.runs import read_run

    fields = read_run(run)
    own = fields["own"]
    about: dict[str, Any] = {"task": fields["task"], "trained": fields["machine"], "label": opened.label}
    if own is not None:
        about |= {"data": own["data"], "fingerprints": own["fingerprints"], "seed": own["seed"], "model": own["model"]}
    return about
