"""`offramp bench`: engines, precisions, batch sizes and policies, measured against the plain model."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.feeding import items_of
from offramp.cli.opening import Opened, open_target
from offramp.cli.options import DataOption, JsonOption, TargetArgument, check_out, names_in, usage, whole_numbers
from offramp.cli.show import is_quiet, line, note, percent, percents, result, table
from offramp.errors import DataError, MissingExtra, NotStageable, ValueRangeError

if TYPE_CHECKING:
    from offramp.bench import Bench, Cell, Opener, Plan, Subject
    from offramp.bench.value import Rate
    from offramp.bundle import Bundle
    from offramp.data import Examples

__all__ = ["bench", "subject_of"]

INTERRUPTED = 130
ENGINES = "eager, compiled, onnx and onnx-file, in fp32, bf16, int8 or int8-batch"


def bench(
    target: TargetArgument,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[DATA]", help="Labelled rows: a table or a folder; for a run its own rows by default."),
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option(help=f"{ENGINES}, e.g. eager,onnx-file:int8; all that work here by default."),
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Rows in a batch.")] = "1,8,32,128",
    policies: Annotated[
        str, typer.Option(help="Names in the bundle or run, or families that are calibrated for each engine.")
    ] = "max-prob,beem-a",
    fraction: Annotated[float, typer.Option(help="What a family may spend, of the plain model's counted cost.")] = 0.5,
    thin: Annotated[
        bool, typer.Option("--thin", help="Let families do with fewer exits where no fewer calibration rows are right.")
    ] = False,
    rows: Annotated[
        int | None,
        typer.Option(help="Rows in a timed round, two batches at the least; 32 to 128 by --seconds, by default."),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=2, help="Calibrate on at most so many rows, and judge on as many others.")
    ] = 1000,
    seconds: Annotated[float, typer.Option(help="About so long for each cell; three rounds at the least.")] = 20.0,
    threads: Annotated[int | None, typer.Option(help="Of every engine; as many as torch has by default.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A JSON file for all figures; finished cells in it are not measured again.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="A page to write with plots and all figures.")] = None,
    data: DataOption = None,
    json_out: JsonOption = False,
) -> None:
    """Measure engines with exits against the same engines without, torch eager, int8 and shallower networks.

    Each engine runs in a process of its own. In each cell the contenders take turns over the same real rows.
    """
    for path in (out, html):
        check_out(path) if path is not None else None
    plan, names = _plan(engines, batch_sizes, policies, fraction, thin, rows, seconds, threads)
    if html is not None:
        _needs_plotly()
    from offramp.bench import Opener

    words = {"target": str(target), "file": file and str(file), "data": data and str(data), "limit": limit,
             "policies": list(names)}  # fmt: skip
    opener = Opener("offramp.cli.benching:subject_of", words)
    found = _measured(opener, plan, out)
    _finish(found, out, html, json_out)


def _measured(opener: "Opener", plan: "Plan", out: Path | None) -> "Bench":
    """What was found, after it was said what is to be done and about how long it takes."""
    from offramp.bench import bench as run
    from offramp.bench import left_to_do
    from offramp.meter import duration

    subject = opener()
    work = left_to_do(subject, plan, out)
    wanted, known = work.cells
    kept = f", {known} are known from {out}" if known else ""
    note(f"{wanted} cells{kept}; about {duration(work.seconds)} on {work.bench.machine}")
    if any(name.startswith("compiled") for name in plan.engines) and known < wanted:
        note("compiling takes some minutes more where the cache does not have this model's code")
    try:
        found = run(subject, plan, opener=opener, out=out, progress=not is_quiet())
    except KeyboardInterrupt:
        note(
            "interrupted: "
            + (f"the same command goes on with what {out} has." if out else "without --out, nothing is kept.")
        )
        raise typer.Exit(INTERRUPTED) from None
    if not found.cells:
        raise NotStageable(
            "no engine ran: " + "; ".join(f"{each.name}: {each.why.rstrip('.')}" for each in found.engines)
        )
    return found


def _finish(found: "Bench", out: Path | None, html: Path | None, json_out: bool) -> None:
    if html is not None:
        from offramp.bench.page import write_page

        write_page(found, html)
    if json_out:
        result(found.to_dict()["fields"], (), True)
        return
    _show(found)
    for path in (out, html):
        line(f"wrote {path}") if path is not None else None


def _plan(
    engines: str | None, batch_sizes: str, policies: str, fraction: float, thin: bool, rows: int | None, seconds: float,
    threads: int | None,
) -> "tuple[Plan, tuple[str, ...]]":  # fmt: skip
    """(the plan, the names of its policies); what is wrong with the words is wrong usage."""
    sizes = whole_numbers(batch_sizes, "--batch-sizes")
    names = names_in(policies) or ()
    asked = names_in(engines)
    from offramp.bench import DEFAULT, Plan

    try:
        plan = Plan(
            engines=asked or DEFAULT, batch_sizes=tuple(dict.fromkeys(sizes)), policies=names, fraction=fraction,
            thin=thin, rows=rows, seconds=seconds, threads=threads,
        )  # fmt: skip
    except ValueRangeError as error:
        raise usage(str(error)) from None
    return plan, names


def subject_of(target: str, file: str | None, data: str | None, limit: int, policies: list[str]) -> "Subject":
    """The model of a bundle or a run, its named policies, and rows to calibrate and to judge on.

    Where these come from one split or one file, one half calibrates and the other judges.

    Args:
        limit: at most so many rows of either kind, the first ones.
        policies: the names that are wanted.

    Raises:
        FormatError: the target is neither a bundle nor a run, or damaged.
        DataError: there are no rows, or they have no labels.
        BadParameter: a policy is neither named there nor a family.
    """
    from offramp.bench import Subject
    from offramp.choices import CHOICES

    opened = open_target(Path(target), None if data is None else Path(data), "cpu")
    bundle = opened.bundle
    if unknown := [name for name in policies if name not in bundle.policies and name not in CHOICES]:
        known = f"{', '.join(bundle.policies)} in {target}, or " if bundle.policies else ""
        raise usage(f"--policies has {unknown[0]!r}; expected {known}families: {', '.join(CHOICES)}.")
    fit, test = _rows(opened, target, file, limit)
    named = {
        name: (choice.policy, "fp32" if choice.calibration is None else choice.calibration.precision)
        for name, choice in bundle.policies.items() if name in policies
    }  # fmt: skip
    return Subject(bundle.model, test, fit, named, title=bundle.title or Path(target).name)


def _rows(opened: Opened, target: str, file: str | None, limit: int) -> "tuple[Examples, Examples]":
    """(rows to calibrate on, rows to judge on)."""
    work = opened.work
    if file is not None:
        return _halves(_labelled(opened, Path(file), 2 * limit), limit)
    if work is None:
        raise DataError(
            f"{target} is a bundle, which holds no rows. Give labelled ones: offramp bench {target} rows.csv"
        )
    _, first, second = work.splits
    if first == second:
        return _halves(_examples(work.load(first, opened.tokenizer), None), limit)
    return tuple(_examples(work.load(name, opened.tokenizer), limit) for name in (first, second))  # type: ignore[return-value]


def _halves(rows: "Examples", limit: int) -> "tuple[Examples, Examples]":
    """Two halves by seed 0, the classes in proportion, each in the rows' order."""
    from offramp.splits import stratified_split

    if rows.labels is None or len(rows) < 4:
        raise DataError(f"there are {len(rows)} rows{'' if rows.labels is not None else ' without labels'}; "
                        "expected at least 4 labelled ones, half to calibrate on and half to judge on.")  # fmt: skip
    one, two = stratified_split(rows.labels, (0.5, 0.5))
    return rows.select(one[:limit]), rows.select(two[:limit])


def _examples(rows: Any, limit: int | None) -> "Examples":
    """The first rows, whatever they are kept in, as Examples."""
    import torch

    from offramp.data import Examples
    from offramp.loaders import as_loader

    most = len(rows) if limit is None else min(limit, len(rows))
    if isinstance(rows, Examples):
        return rows.select(torch.arange(most))
    batches = list(islice(as_loader(rows, 1), most))
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return Examples(
        torch.cat([batch.inputs for batch in batches]), torch.cat(labels) if len(labels) == len(batches) else None
    )


def _labelled(opened: Opened, file: Path, most: int) -> "Examples":
    """The rows of a file as `predict` reads them, with their labels.

    Raises:
        DataError: there are none, or one cannot be used or has no label that the model knows.
    """
    import torch

    from offramp.data import Examples

    bundle, label = opened.bundle, opened.label
    preprocess: Any = bundle.preprocess
    if preprocess is None:
        raise DataError("it is not known how rows become inputs, so a file of rows is of no use. Bench the run itself.")
    rows, labels = [], []
    for item in islice(items_of([], file, preprocess), most):
        bad = item.bad or preprocess.check(item.values)
        if bad is not None:
            raise DataError(f"{item.where}: {bad.rstrip('.')}. Mend it, or leave the row out.")
        rows.append(item.values)
        labels.append(_label(bundle, label or "label", item))
    if not rows:
        raise DataError(f"{file} has no rows. Give labelled ones.")
    return Examples(preprocess.batch(rows), torch.tensor(labels), pad_id=getattr(preprocess, "pad_id", 0))


def _label(bundle: "Bundle", column: str, item: Any) -> int:
    said = item.values.get(column)
    if said is None:
        raise DataError(
            f"{item.where} has no column {column!r}, which holds the label; it has {', '.join(item.values)}."
        )
    if str(said).strip() not in bundle.labels:
        raise DataError(f"{item.where} has the label {said!r}; expected one of {', '.join(bundle.labels[:20])}.")
    return bundle.labels.index(str(said).strip())


def _needs_plotly() -> None:
    from importlib.util import find_spec

    if find_spec("plotly") is None:
        raise MissingExtra("the page needs plotly: pip install 'offramp[report]'.")


def _show(found: "Bench") -> None:
    """Nothing; the figures are on standard output as tables."""
    line(found.headline())
    cells = sorted(found.cells, key=lambda cell: cell.batch_size)
    which = ("engine", "batch", "policy")
    for size in sorted({cell.batch_size for cell in cells}):
        table(
            f"\nBatch {size}: milliseconds a batch, and times as fast as the same engine without exits (whole)",
            ("engine", "policy", "live", "spread", "whole", "rows/s", "speed-up", "promise", "kept", "none taken",
             "vs torch"),
            ((c.name, c.policy, f"{c.live.median_ms:.2f}", f"{c.live.spread_ms:.2f}", f"{c.whole.median_ms:.2f}",
              f"{c.live.rows_per_s:.0f}", f"{c.speedup:.2f}x", f"{c.promise:.2f}x", f"{100 * c.kept:.0f} %",
              "" if c.unused_time is None else f"{c.unused_time:.2f}x", f"{c.eager_speedup:.2f}x")
             for c in cells if c.batch_size == size),
        )  # fmt: skip
    table(
        f"Accuracy on {cells[0].judged} rows, against the plain model in its own precision",
        (*which, "right, 95 % interval", "less plain", "whole", "left at each exit"),
        ((*_which(c), _rate(c.accuracy), _points_lost(c.lost), percent(c.whole_accuracy.value), percents(c.shares))
         for c in cells),
    )  # fmt: skip
    table(
        "What one would pick instead, no less right on these rows: one exit for all rows, or a whole model",
        (*which, "cut at exit", "right", "live over it", "fastest as right, any engine", "live over it"),
        ((*_which(c), *_instead(found, c)) for c in cells),
    )
    if tails := [cell for cell in cells if cell.tail is not None]:
        table(
            f"Milliseconds of single rows at 50, 95 and 99 % of {tails[0].tail.calls} calls",  # type: ignore[union-attr]
            ("engine", "policy", "live", "whole"),
            ((c.name, c.policy, _points(c.tail.live), _points(c.tail.whole)) for c in tails),  # type: ignore[union-attr]
        )
    _show_engines(found)
    line(f"measured on {found.machine}")


def _which(cell: "Cell") -> tuple[str, str, str]:
    return cell.name, str(cell.batch_size), cell.policy


def _instead(found: "Bench", cell: "Cell") -> tuple[str, ...]:
    short, other = cell.shorter, found.instead(cell)
    cut = ("none", "", "") if short.exit is None else (
        str(short.exit), percent(short.accuracy.value), f"{short.took.median_ms / cell.live.median_ms:.2f}x",  # type: ignore[union-attr]
    )  # fmt: skip
    return (*cut, *(("nothing", "") if other is None else (other.what, f"{other.ratio:.2f}x")))


def _show_engines(found: "Bench") -> None:
    """Nothing; what is known of each engine is on standard output."""
    rows = []
    for each in found.engines:
        made_on = ", ".join(
            f"{name}: {t.made_on}" + (f" ({t.status.replace('_', ' ')})" if t.status != "met" else "")
            for name, t in each.thresholds.items()
        )
        if off := {f"{name}: exits {', '.join(map(str, t.exits))}" for name, t in each.thresholds.items() if t.exits}:
            made_on += f"; {'; '.join(sorted(off))}"
        ready = bool(each.thresholds)
        memory = "" if each.peak_mb is None else f"{each.peak_mb:.0f} ({each.kept_mb:.0f})"
        rows.append((each.name, f"{each.made_s:.1f}" if ready else "", memory, made_on, each.why or "ran"))
    table(
        "Engines: seconds until the first answers, MB that the process grew at most (and kept)",
        ("engine", "s", "MB", "thresholds are made on logits in; exits, where some are off", "how it went"),
        rows,
    )
    foreign = [(each.name, name, value) for each in found.engines for name, value in each.foreign.items()]
    if foreign:
        table(
            "Thresholds of the model's own precision on another's logits, and its own ones (recorded, not live)",
            ("engine", "policy", "other exit", "right", "cost", "own ones right", "cost"),
            ((engine, name, percent(f.changed), _rate(f.accuracy), f"{f.cost:.3f}", _rate(f.own_accuracy),
              f"{f.own_cost:.3f}") for engine, name, f in foreign),
        )  # fmt: skip


def _rate(rate: "Rate") -> str:
    return f"{100 * rate.value:.1f} ({100 * rate.low:.1f} to {100 * rate.high:.1f})"


def _points_lost(rate: "Rate") -> str:
    return f"{100 * rate.value:+.1f} ({100 * rate.low:+.1f} to {100 * rate.high:+.1f})"


def _points(milliseconds: tuple[float, float, float]) -> str:
    return " ".join(f"{each:.2f}" for each in milliseconds)
