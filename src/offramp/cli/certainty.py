"""`offramp certainty`: teach a trained run to say how certain it is that an exit is right."""

from typing import Annotated

import typer

from offramp.cli.options import DataOption, DeviceOption, JsonOption, RunArgument, check_out, open_run
from offramp.cli.show import is_quiet, note, percent, result

__all__ = ["certainty"]

EpochsOption = Annotated[int, typer.Option(min=1, help="Passes over the features of the run's training rows.")]


def certainty(
    run: RunArgument,
    epochs: EpochsOption = 3,
    data: DataOption = None,
    device: DeviceOption = "auto",
    json_out: JsonOption = False,
) -> None:
    """Learn at every exit how certain it is that the exit is right, which the policy BERxiT decides by.

    It is learned from the rows that the run was trained on and kept in the run. The exits themselves stay as they are.
    """
    check_out(run, folder=True) if run.is_dir() else None
    work, model, tokenizer = open_run(run, data, device)
    from offramp.certainty import learn_certainty
    from offramp.runs import made_from, save_signals

    rows = work.load(work.splits[0], tokenizer)
    report = learn_certainty(model, rows, epochs=epochs, progress=not is_quiet())
    save_signals(run, model)
    if old := made_from(run):
        note(
            f"warning: {', '.join(path.name for path in old)} in {run} were made before this certainty was learned; "
            f"make them again: offramp record {run} && offramp measure {run}"
        )
    lines = [f"learned a certainty from {report.rows} rows of {work.name} in {report.seconds:.0f} s"]
    for k, (right, error, auroc) in enumerate(zip(report.right, report.error, report.auroc, strict=True)):
        told = "its rows are all of one kind" if auroc is None else f"AUROC {auroc:.3f}"
        lines.append(f"exit {k}: {percent(right)} of rows right; {told}, mean squared error {error:.4f}")
    lines.append(f"wrote {run}; next: offramp record {run} && offramp measure {run}")
    result({"run": str(run), "signals": model.signals, "report": report.to_dict()}, lines, json_out)
