"""`offramp report`: a page about a run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.options import DataOption, JsonOption, Metric, RunArgument, SeedOption, check_out, whole_numbers
from offramp.cli.show import is_quiet, line, note, percent, percents, result, table
from offramp.cli.targets import budgets_of, families_of, known_families, place_of
from offramp.errors import DataError, MissingExtra

if TYPE_CHECKING:
    from offramp.cli.opening import Opened
    from offramp.cli.targets import Place
    from offramp.compare import Compared
    from offramp.cost import CostModel
    from offramp.report import Example, Report, Shown
    from offramp.timing import Speed
    from offramp.trace import ExitTrace

__all__ = ["report"]

HEADLINE = "max-prob,entropy,patience,beem-c,beem-a,eenet"  # of `offramp.compare`; a page of all is hard to read
MOST_POLICIES = 8
TIMED_ROWS = 256


def report(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="The page to write; RUN/report.html by default.")] = None,
    picture: Annotated[
        list[Path] | None, typer.Option(help="Also the main figure, .svg, .png or .pdf; may be repeated.")
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Of the curve, parts of the plain model's cost: FIRST:LAST:STEP, or with commas.")
    ] = "0.3:0.9:0.1",
    policies: Annotated[str, typer.Option(help="Families of the curve: all, or names with commas.")] = HEADLINE,
    fraction: Annotated[
        float, typer.Option(help="The budget that is shown and timed where the run has no calibrated policies.")
    ] = 0.5,
    metric: Annotated[Metric, typer.Option(help="What quality is.")] = Metric.accuracy,
    batch_sizes: Annotated[str, typer.Option(help="Sizes to time live runs at.")] = "1,8,32",
    seconds: Annotated[float, typer.Option(min=0.1, help="Of timing, for each size.")] = 15.0,
    timing: Annotated[bool, typer.Option(help="Time live runs; without it the page claims no speed.")] = True,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Of halves in turn, where one split is all.")] = 5,
    data: DataOption = None,
    seed: SeedOption = 0,
    json_out: JsonOption = False,
) -> None:
    """Write a page about a run that was recorded and measured: the answer, figures, examples, what was fitted on what.

    The page is one file that works offline; the same figures are in RUN/report.json and in the terminal.
    """
    families, fractions, sizes = families_of(policies), budgets_of(budgets), whole_numbers(batch_sizes, "--batch-sizes")
    path = check_out(out or run / "report.html") if run.is_dir() else Path()
    for each in picture or ():
        check_out(each)
    _needs("plotly", "the page")
    _needs("matplotlib", "a picture") if picture else None
    place = place_of(run, None)
    if place.run is None:
        raise DataError(f"{run} is no run; expected a folder of `offramp train`.")
    from offramp.report import to_picture, write_html

    made = _made(
        place, data, families, policies == "all", fractions, sizes, fraction=fraction, metric=metric.value,
        seconds=seconds, timing=timing, title=title, repeats=repeats, seed=seed,
    )  # fmt: skip
    write_html(made, path)
    made.save(path.with_suffix(".json"))
    pictures = [str(to_picture(made, each)) for each in picture or ()]
    value = {"out": str(path), "bytes": path.stat().st_size, "pictures": pictures, "headline": made.headline()}
    if json_out:
        result(value | {"report": made.to_dict()["fields"]}, (), True)
        return
    _show(made)
    line(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB), {path.with_suffix('.json')}"
         + "".join(f", {each}" for each in pictures))  # fmt: skip


def _needs(package: str, what: str) -> None:
    """Nothing, when the package is installed: found out before the work, not after it."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingExtra(f"{what} needs {package}: pip install 'offramp[report]'.")


def _made(
    place: "Place", data: Path | None, families: tuple[str, ...], every: bool, fractions: tuple[float, ...],
    sizes: tuple[int, ...], *, fraction: float, metric: str, seconds: float, timing: bool, title: str | None,
    repeats: int, seed: int,
) -> "Report":  # fmt: skip
    from offramp.cli.opening import run_as_bundle
    from offramp.report import build_report
    from offramp.runs import read_run
    from offramp.trace import ExitTrace

    opened = run_as_bundle(place.run, data, "cpu")  # type: ignore[arg-type]
    fit, costs = place.load()
    families = known_families(families, fit) if every else families
    test = fit if place.test is None else ExitTrace.load(place.test)
    curve = _curve(fit, place, costs, families, fractions, metric, repeats, seed)
    shown, values = _shown(opened, fit, test, place, costs, curve, families, fraction, metric, repeats, seed)
    speeds: tuple[tuple[Any, ...], tuple[Any, ...]] = ((), ())
    notes = [opened.work.note] if opened.work is not None and opened.work.note else []
    if place.test is None:
        notes.append(f"Calibration and test rows are halves of one split in turn, {repeats} times.")
    if timing:
        speeds = _timed(opened, values, costs, sizes, seconds)
    else:
        notes.append("Nothing was timed: this report makes no claim about speed.")
    fields = read_run(place.run)  # type: ignore[arg-type]
    return build_report(
        test,
        costs,
        title=title or f"Early exits on {opened.bundle.title}",
        curve=curve,
        policies=shown,
        speeds=speeds[0],
        unused=speeds[1],
        labels=opened.bundle.labels,
        taps=opened.bundle.model.taps,
        metric=metric,
        examples=_examples(opened, test, values, costs),
        parts=_parts(fields, fit, test),
        notes=notes,
        command=" ".join(["offramp", *sys.argv[1:]]),
    )


def _curve(
    fit: "ExitTrace", place: "Place", costs: "CostModel", families: tuple[str, ...], fractions: tuple[float, ...],
    metric: str, repeats: int, seed: int,
) -> "list[Compared]":  # fmt: skip
    """Every family at every budget, on rows that it was not calibrated on."""
    import torch

    from offramp.compare import compare_pools
    from offramp.cost import Budget
    from offramp.meter import Meter
    from offramp.pools import Pool, halves
    from offramp.trace import ExitTrace

    test = None if place.test is None else ExitTrace.load(place.test)
    pools = [Pool(fit, test, torch.arange(test.rows))] if test is not None else halves(fit, repeats, seed=seed)
    budgets = [Budget(fraction=fraction) for fraction in fractions]
    with Meter("comparing", len(families) * len(pools), show=not is_quiet()) as meter:
        return list(
            compare_pools(pools, (test or fit).rows, costs, budgets, families, metric=metric, progress=meter.advance)
        )


def _shown(
    opened: "Opened", fit: "ExitTrace", test: "ExitTrace", place: "Place", costs: "CostModel", curve: "list[Compared]",
    families: tuple[str, ...], fraction: float, metric: str, repeats: int, seed: int,
) -> "tuple[list[Shown], dict[str, Any]]":  # fmt: skip
    """(policies for the page, the same by name for timing): the run's own, or every family at one budget."""
    from offramp.choices import calibrate_choice
    from offramp.cost import Budget
    from offramp.report import Shown, shown_of

    if place.test is not None and opened.bundle.policies:
        chosen = dict(list(opened.bundle.policies.items())[:MOST_POLICIES])
        if len(opened.bundle.policies) > MOST_POLICIES:
            note(f"note: the first {MOST_POLICIES} of {len(opened.bundle.policies)} policies are shown.")
        shown = []
        for name, choice in chosen.items():
            message = "" if choice.calibration is None else choice.calibration.message
            rows = 0 if choice.calibration is None else choice.calibration.rows
            family = _family(name, families)
            shown.append(
                shown_of(name, family, choice.policy, test, costs, metric=metric, message=message, fitted_rows=rows)
            )
        return shown, {name: choice.policy for name, choice in chosen.items()}
    found = {name: calibrate_choice(name, fit, costs, Budget(fraction=fraction)) for name in families}
    if place.test is not None:
        shown = [
            shown_of(name, name, c.policy, test, costs, metric=metric, message=c.message, fitted_rows=c.rows)
            for name, c in found.items()
        ]
    else:  # one split: what is shown of a policy is from halves it was not calibrated on
        pooled = _curve(fit, place, costs, families, (fraction,), metric, repeats, seed)
        shown = [
            Shown(
                row.family,
                row.family,
                "",
                fit.rows // 2,
                row.cost,
                row.value,
                row.value_low,
                row.value_high,
                row.shares,
            )
            for row in pooled
        ]
    return shown, {name: c.policy for name, c in found.items()}


def _family(name: str, families: tuple[str, ...]) -> str:
    """The family that a policy's name begins with."""
    from offramp.choices import CHOICES

    return next((family for family in CHOICES if name.startswith(family)), name)


def _timed(
    opened: "Opened", policies: dict[str, Any], costs: "CostModel", sizes: tuple[int, ...], seconds: float
) -> "tuple[tuple[Speed, ...], tuple[Speed, ...]]":
    """(live runs of the policies, live runs where none is taken) at every size that the test rows fill."""
    from offramp.loaders import as_loader
    from offramp.timing import never, time_policies

    work = opened.work
    if work is None or not policies:
        return (), ()
    rows = work.load(work.splits[2], opened.tokenizer)
    everything = {**policies, "none taken": never(next(iter(policies.values())))}
    speeds: list[Speed] = []
    for size in sizes:
        batches = []
        for batch in as_loader(rows, size):
            if len(batch.rows) == size:
                batches.append(batch.inputs)
            if len(batches) * size >= max(TIMED_ROWS, 2 * size):
                break
        if not batches:
            note(f"note: {len(rows)} test rows do not fill a batch of {size}; it is not timed.")
            continue
        note(f"timing {len(policies)} policies at batch {size}, about {seconds:.0f} s ...")
        speeds += time_policies(opened.bundle.model, everything, batches, costs=costs, seconds=seconds)  # type: ignore[arg-type]
    return (
        tuple(speed for speed in speeds if speed.policy != "none taken"),
        tuple(speed for speed in speeds if speed.policy == "none taken"),
    )


def _examples(opened: "Opened", test: "ExitTrace", policies: dict[str, Any], costs: "CostModel") -> "list[Example]":
    """Test rows that left early and late under the first policy, as texts or small pictures."""
    from offramp.report import Example, pick_examples
    from offramp.report.thumbs import shown_row
    from offramp.simulate import simulate

    if not policies or opened.work is None or test.labels is None:
        return []
    outcome = simulate(next(iter(policies.values())), test, costs)
    probability, said = outcome.answer.softmax(-1).max(-1)
    rows = opened.work.load(opened.work.splits[2], opened.tokenizer)
    if len(rows) != test.rows:
        return []
    decode = _decoder(opened)
    found = []
    for i in pick_examples(outcome.exit, said, test.labels, probability):
        text, image = shown_row(rows, i, decode)
        labels = opened.bundle.labels
        found.append(
            Example(
                int(outcome.exit[i]),
                labels[int(said[i])],
                labels[int(test.labels[i])],
                float(probability[i]),
                text,
                image,
            )
        )
    return found


def _decoder(opened: "Opened") -> Any:
    """A function from token ids to a text, or None."""
    preprocess = opened.bundle.preprocess
    if preprocess is not None and preprocess.kind == "text":
        return preprocess.decode  # type: ignore[attr-defined]
    return None


def _parts(fields: dict[str, Any], fit: "ExitTrace", test: "ExitTrace") -> "list[Any]":
    from offramp.report import Part

    own = fields["own"]
    source = fields["task"] if own is None else f"{own['data']}, seed {own['seed']}"
    prints = ["", "", ""] if own is None else [f", fingerprint {mark}" for mark in own["fingerprints"]]
    epochs = fields["report"]["epochs"]
    trained = int(epochs[-1].get("rows", 0)) if epochs else 0
    same = fit.source == test.source and fit.rows == test.rows
    parts = [Part("training", trained, f"{source}{prints[0]}")]
    if same:
        return [*parts, Part("calibrating and testing, halves in turn", fit.rows, fit.source)]
    return [
        *parts,
        Part("calibrating (nothing is certified in this version)", fit.rows, f"{fit.source}{prints[1]}"),
        Part("testing", test.rows, f"{test.source}{prints[2]}"),
    ]


def _show(made: "Report") -> None:
    """Nothing; the report's figures are on standard output."""
    line(made.headline())
    line(made.detail())
    timed = [(policy, live) for policy in made.policies for live in policy.live]
    table(
        "\nOn rows that neither training nor calibration saw",
        ("policy", "cost", made.metric, "95 % interval", "plain", "left at each exit"),
        [
            (p.name, f"{p.cost:.3f}", percent(p.value), f"{100 * p.low:.1f} to {100 * p.high:.1f}",
             percent(made.plain[0]), percents(p.shares))
            for p in made.policies
        ],
    )  # fmt: skip
    if timed:
        table(
            "Measured live",
            ("policy", "batch", "plain ms", "live ms", "speed-up", "promise"),
            [
                (p.name, str(m.batch_size), f"{m.plain_ms:.2f}", f"{m.policy_ms:.2f}", f"{m.speedup:.2f}x",
                 "" if m.promise is None else f"{m.promise:.2f}x")
                for p, m in timed
            ],
        )  # fmt: skip
