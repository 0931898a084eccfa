"""`offramp export`: a bundle as one ONNX file with the exits inside."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.cli.opening import open_target, picked
from offramp.cli.options import DataOption, JsonOption, PartOption, PolicyOption, TargetArgument, check_out, usage
from offramp.cli.show import is_quiet, percents, result

__all__ = ["export"]


def export(
    target: TargetArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, e.g. reviews.onnx.")],
    policy: PolicyOption = None,
    fraction: PartOption = None,
    precision: Annotated[
        str, typer.Option(help="fp32, int8 (row by row), or int8-batch (rows depend on each other).")
    ] = ("fp32"),
    stages: Annotated[
        bool,
        typer.Option("--stages", help="OUT is a folder: a file for each visited exit, for schedulers."),
    ] = False,
    data: DataOption = None,
    json_out: JsonOption = False,
) -> None:
    """Write stages, heads, a policy and regrouping as one ONNX file that onnxruntime runs by itself.

    Rows that are done leave the batch inside the graph. The file is compared with the model on three rows before it is
    written. It takes the network's inputs, and `thresholds`, which may be left out.
    """
    if stages:
        _stages(target, out, policy, fraction, precision, data, json_out)
        return
    if out.suffix != ".onnx":
        raise usage(f"OUT is {str(out)!r}; expected a name that ends in .onnx.")
    check_out(out)
    opened = open_target(target, data, "cpu")
    chosen = picked(opened, policy, fraction, None, 1)
    from offramp.meter import Meter
    from offramp.onnx import export as write
    from offramp.onnx import read_about

    began = time.perf_counter()
    with Meter("stages", opened.bundle.model.exits, show=not is_quiet()) as meter:
        path = write(
            opened.bundle, out, policy=chosen.name if chosen.inside else chosen.policy, precision=precision,
            progress=meter.advance,
        )  # fmt: skip
    about = read_about(path)
    value: dict[str, Any] = {
        "out": str(path),
        "bytes": path.stat().st_size,
        "policy": chosen.name,
        "exits": about["exits"],
        "visited": about["visited"],
        "opset": about["opset"],
        "seconds": time.perf_counter() - began,
    }
    lines = [
        f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB, opset {about['opset']}) in {value['seconds']:.0f} s",
        f"policy {chosen.name}: {type(chosen.policy).__name__}, visits exits {', '.join(map(str, about['visited']))}; "
        "three rows left where the model lets them leave",
    ]
    if (costs := about.get("costs")) is not None:
        lines.append(f"cost up to each exit, of the plain model: {percents(costs)}")
    result(value, lines, json_out)


def _stages(
    target: Path,
    out: Path,
    policy: str | None,
    fraction: float | None,
    precision: str,
    data: Path | None,
    json_out: bool,
) -> None:
    """Nothing; a file for each visited exit is in the folder."""
    check_out(out, folder=True)
    opened = open_target(target, data, "cpu")
    chosen = picked(opened, policy, fraction, None, 1)
    from offramp.meter import Meter
    from offramp.onnx import export_stages_to

    with Meter("stages", opened.bundle.model.exits, show=not is_quiet()) as meter:
        folder = export_stages_to(
            opened.bundle, out, policy=chosen.name if chosen.inside else chosen.policy, precision=precision,
            progress=meter.advance,
        )  # fmt: skip
    files = sorted(path.name for path in folder.glob("visit-*.onnx"))
    result(
        {"out": str(folder), "policy": chosen.name, "files": files},
        [f"wrote {len(files)} files and stages.json to {folder}"],
        json_out,
    )
