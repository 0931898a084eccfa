"""The commands, the global options, and what becomes of errors.

Exit codes: 0 ok, 1 an error that the message explains, 2 wrong usage, 3 a budget that cannot be met, 4 rows that have
shifted, 5 too few rows to say, 70 a mistake of Offramp's own, 130 interrupted, 141 the reader of standard output has
gone.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from offramp.cli import (
    answers,
    attaching,
    benching,
    bundling,
    certainty,
    checking,
    choosing,
    comparing,
    exporting,
    generating,
    reporting,
    running,
    training,
)
from offramp.cli.show import note, set_quiet
from offramp.errors import OfframpError

__all__ = ["FAILED", "INFEASIBLE", "INTERRUPTED", "app", "main"]

FAILED, INFEASIBLE, BUG, INTERRUPTED, PIPE_CLOSED = 1, choosing.INFEASIBLE, 70, 130, 141

COMMANDS: dict[str, tuple[Any, str]] = {
    "quickstart": (running.quickstart, "offramp quickstart --out runs/digits"),
    "attach": (attaching.attach, "offramp attach minilm --every 2"),
    "train": (training.train, "offramp train reviews.csv --model minilm --out runs/reviews"),
    "certainty": (certainty.certainty, "offramp certainty runs/reviews --epochs 10"),
    "record": (running.record, "offramp record runs/reviews"),
    "measure": (running.measure, "offramp measure runs/reviews --batch-sizes 1,8,32"),
    "calibrate": (
        choosing.calibrate,
        "offramp calibrate runs/reviews --policy beem-a --fraction 0.5",
    ),
    "compare": (
        comparing.compare,
        "offramp compare runs/reviews --policies max-prob,beem-a --budgets 0.4,0.6",
    ),
    "check": (checking.check, "offramp check reviews.offramp new.csv"),
    "bench": (benching.bench, "offramp bench runs/reviews --engines eager,onnx-file:int8 --html bench.html"),
    "predict": (answers.predict, "offramp predict reviews.offramp 'a film that stays with you'"),
    "generate": (generating.generate, "offramp generate 'A man riding' --bundle coco.offramp --exits"),
    "caption": (generating.caption, "offramp caption image.jpg --bundle scenes.offramp --html captions.html"),
    "export": (exporting.export, "offramp export reviews.offramp reviews.onnx"),
    "report": (reporting.report, "offramp report runs/reviews --picture reviews.svg"),
    "inspect": (answers.inspect, "offramp inspect reviews.offramp"),
}


class _Commands(TyperGroup):
    """The group of commands; it turns a user's mistake into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        debug = bool(ctx.params.get("debug"))
        with warnings.catch_warnings():
            if not debug:
                warnings.showwarning = _show_warning  # type: ignore[assignment]
            try:
                result = super().invoke(ctx)
                sys.stdout.flush()  # here, where a closed pipe is still caught
                return result
            except KeyboardInterrupt:
                note("interrupted. A training goes on when the same command is given again.")
                raise typer.Exit(INTERRUPTED) from None
            except BrokenPipeError:
                # the reader has gone (`| head`); what Python still flushes at its end must go nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(PIPE_CLOSED) from None
            except Exception as error:
                told = _told(error)
                if debug or _is_usage(error):
                    raise
                if told is None:
                    first = (str(error).splitlines() or ["no reason given"])[0][:300]
                    note(
                        f"error: {type(error).__name__}: {first}. This is a mistake in Offramp, not yours; please "
                        "report it with the traceback that `offramp --debug ...` shows."
                    )
                    raise typer.Exit(BUG) from None
                note(f"error: {told}")
                raise typer.Exit(FAILED) from None


app = typer.Typer(
    cls=_Commands,
    help="Early exits for any PyTorch model that save measured time.",
    epilog="Examples: offramp quickstart | offramp train reviews.csv --model minilm --out runs/reviews. Exit codes: 0 "
    "ok, 1 an error that the message explains, 2 wrong usage, 3 a budget that cannot be met, 4 rows that have shifted, "
    "5 too few rows to say, 70 a mistake of Offramp's own, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> bool:
    if value:
        from importlib.metadata import version

        typer.echo(f"offramp {version('offramp')}")
        raise typer.Exit
    return value


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="OFFRAMP_DEBUG", help="Show tracebacks and all warnings.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Only results, warnings and errors: no notes, no progress.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Early exits for any PyTorch model that save measured time."""
    set_quiet(quiet)


for _name, (_command, _example) in COMMANDS.items():
    app.command(_name, epilog=f"Example: {_example}")(_command)
app.add_typer(bundling.app, name="bundle")


def main() -> None:
    """Nothing; the process ends with an exit code. What the program `offramp` runs."""
    try:
        app(prog_name="offramp")
    except KeyboardInterrupt:  # before a command began
        sys.exit(INTERRUPTED)


def _told(error: Exception) -> str | None:
    """The line for a person, when the error is a mistake or a state of the machine; None when it is a bug of ours."""
    if isinstance(error, OfframpError):
        return str(error)
    if "No space left on device" in str(error):
        return "no space is left on the disk. Free some, or choose another place with --out; older files are whole."
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        return "there is not enough memory. Give a smaller --batch-size, --limit or --max-length."
    if type(error).__name__ == "SafetensorError":  # what it raises for a full or read-only disk, too
        return f"{error}. Check the file and its folder."
    return None


def _is_usage(error: Exception) -> bool:
    """Whether the command line itself says what is wrong, or the program has ended."""
    usage = next((kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"), typer.BadParameter)
    return isinstance(error, usage | typer.Exit | typer.Abort)


def _show_warning(message: Any, category: Any, filename: str, *_: Any) -> None:
    """Our own warnings as notes; those of other packages are for --debug."""
    if Path(__file__).parent.parent in Path(filename).parents:
        note(f"note: {message}")
