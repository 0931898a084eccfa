"""The report as one HTML file that asks nothing of the network: figures by plotly, tables and words in the page."""

import base64
import gzip
import json
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from pathlib import Path
from string import Template

from offramp.artefacts import write_atomically
from offramp.errors import MissingExtra
from offramp.report.colours import colour_of, shades
from offramp.report.value import Example, Report

__all__ = ["as_script", "plotly_script", "to_html", "write_html"]


def to_html(report: Report) -> str:
    """The page: the answer first, then the figures, each with its numbers in a table.

    Every word that comes from data is escaped. plotly's script is in the page, packed.

    Raises:
        MissingExtra: plotly is not installed.
    """
    value = report.to_dict()["fields"]
    value.pop("examples")  # they stand in the page as words and pictures
    families = {*(point.family for point in report.curve), *(policy.family for policy in report.policies)}
    value["shades"] = shades((policy.name, policy.family) for policy in report.policies)
    value["colours"] = {family: colour_of(family) for family in sorted(families)}
    page = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    sections = (_curve, _times, _shares, _exits, _classes, _examples, _provenance)
    return page.substitute(
        title=escape(report.title),
        body=_hero(report) + "".join(section(report) for section in sections),
        footer=escape(_footer(report)),
        data=as_script(value),
        plotly=plotly_script(),
    )


def write_html(report: Report, path: str | Path) -> Path:
    """The path, after the page was written to it (atomically)."""
    text = to_html(report)

    def write(to: Path) -> None:
        to.write_text(text, encoding="utf-8")

    return write_atomically(path, write)


def as_script(value: object) -> str:
    """JSON that no text in it can end."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def plotly_script() -> str:
    """plotly's script, packed by gzip and written in base64.

    Raises:
        MissingExtra: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingExtra("the page needs plotly: pip install 'offramp[report]'.") from None
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _hero(report: Report) -> str:
    best = report.best()
    facts = [(f"{100 * report.plain[0]:.1f} %", f"{report.metric.replace('-', ' ')} of the plain model")]
    if best is not None:
        policy, live = best
        facts = [
            (f"{live.speedup:.2f}x", f"measured, {policy.name}, batch {live.batch_size}"),
            (f"{100 * policy.value:.1f} %", f"{report.metric.replace('-', ' ')} with exits"),
            *facts,
        ]
        facts.append((f"{100 * policy.cost:.0f} %", "of the plain model's FLOPs (counted)"))
    facts.append((str(len(report.exits)), "exits, the model's own output included"))
    boxes = "".join(f"<div><b>{escape(big)}</b><span>{escape(small)}</span></div>" for big, small in facts)
    said = f'<h1>{escape(report.headline())}</h1><p class="lead">{escape(report.detail())}</p>'
    return f'{said}<div class="facts">{boxes}</div>'


def _curve(report: Report) -> str:
    if not report.curve:
        return _missing("Accuracy against cost", "No policies were compared over budgets.")
    rows = [
        (p.family, p.target, p.status, f"{p.cost:.3f}", _pc(p.value), f"{_pc(p.low)} to {_pc(p.high)}")
        for p in report.curve
    ]
    return _section(
        f"{report.metric.replace('-', ' ').capitalize()} against cost",
        "Each point is a policy, calibrated on other rows than these. Bands are 95 % intervals: where they overlap, "
        "the difference may be chance. The cost is counted in FLOPs; measured times are below.",
        '<div id="curve" class="fig" role="img" aria-label="Line chart of accuracy against cost per policy"></div>',
        _rows(("policy", "asked", "status", "cost", report.metric, "95 % interval"), rows),
    )


def _times(report: Report) -> str:
    timed = [policy for policy in report.policies if policy.live]
    if not timed:
        return _missing(
            "Measured time",
            "Nothing was timed for this report, so it makes no claim about speed: the costs above are counted.",
        )
    rows = [
        (
            policy.name, str(live.batch_size), f"{live.plain_ms:.2f}", f"{live.policy_ms:.2f}", f"{live.spread_ms:.2f}",
            _Cell(f"{live.speedup:.2f}x", "good" if live.speedup > 1 else "bad"),
            "-" if live.promise is None else f"{live.promise:.2f}x",
            "-" if live.promise is None else f"{100 * live.speedup / live.promise:.0f} %",
        )
        for policy in timed for live in policy.live
    ]  # fmt: skip
    rows += [
        ("every exit visited, none taken", str(live.batch_size), f"{live.plain_ms:.2f}", f"{live.policy_ms:.2f}",
         f"{live.spread_ms:.2f}", _Cell(f"{live.speedup:.2f}x", "good" if live.speedup > 1 else "bad"), "-", "-")
        for live in report.unused
    ]  # fmt: skip
    return _section(
        "Measured time",
        "Whole live runs, heads, policy and regrouping included, in turns with the plain model on the same rows. "
        "Points are medians. Dotted lines are what the stages alone would allow. Lower is better.",
        '<div id="times" class="fig" role="img" aria-label="Line chart of time a row against batch size"></div>',
        _rows(("policy", "batch", "plain ms", "with exits ms", "spread", "speed-up", "promise", "kept"), rows),
    )


def _shares(report: Report) -> str:
    if not report.policies:
        return _missing("Where rows leave", "No policy was given.")
    rows = [
        (p.name, f"{p.cost:.3f}", _pc(p.value), f"{_pc(p.low)} to {_pc(p.high)}", *(_pc(share) for share in p.shares))
        for p in report.policies
    ]
    names = [f"exit {exit.exit}" for exit in report.exits]
    return _section(
        "Where rows leave",
        "The share of test rows that leave at each exit. The last one is the whole model.",
        '<div id="shares" class="fig short" role="img" aria-label="Stacked bars of exit shares per policy"></div>',
        _rows(("policy", "cost", report.metric, "95 % interval", *names), rows),
    )


def _exits(report: Report) -> str:
    rows = [
        (f"{e.exit}", e.tap, f"{e.cost:.3f}", _pc(e.accuracy), f"{_pc(e.low)} to {_pc(e.high)}", f"{e.ece:.3f}")
        for e in report.exits
    ]
    figures = (
        '<div class="pair"><div><h3>Accuracy of each exit on all rows</h3><div id="exits" class="fig short" role="img" '
        'aria-label="Bars of accuracy per exit"></div></div><div><h3>Does confidence mean what it says?</h3>'
        '<div id="reliability" class="fig short" role="img" aria-label="Reliability diagram"></div></div></div>'
    )
    return _section(
        "The exits alone",
        "How good each exit is on its own, and whether it is right as often as it is sure: on the dotted line it is. "
        "ECE is the mean distance from that line.",
        figures,
        _rows(("exit", "behind", "cost", "accuracy", "95 % interval", "ECE"), rows),
    )


def _classes(report: Report) -> str:
    counts = [rows for rows, *_ in report.classes]
    if not counts or max(counts) < 1.5 * max(1, min(counts)):
        return ""
    rows = [
        (label, str(count), _pc(recall), _pc(precision), _pc(f1))
        for label, (count, recall, precision, f1) in zip(report.labels, report.classes, strict=False)
    ]
    return (
        "<section><h2>Classes</h2><p>The classes differ in size, so accuracy says little of the small ones. These "
        "are the plain model's figures.</p>"
        + _rows(("class", "rows", "recall", "precision", "F1"), rows)
        + "</section>"
    )


def _examples(report: Report) -> str:
    if not report.examples:
        return ""
    last = len(report.exits) - 1
    early = [example for example in report.examples if example.exit < last]
    late = [example for example in report.examples if example.exit == last]
    parts = ["<section><h2>Rows that left early, and rows that did not</h2>"]
    for name, examples in (("Left early", early), ("Needed the whole model", late)):
        if examples:
            parts.append(f'<h3>{name}</h3><div class="cards">{"".join(map(_card, examples))}</div>')
    return "".join((*parts, "</section>"))


def _card(example: Example) -> str:
    right = example.said == example.truth
    shown = f"<p>{escape(example.text)}</p>" if example.text else ""
    if example.image.startswith("data:image/"):
        shown += f'<img src="{escape(example.image, quote=True)}" alt="a test image of class {escape(example.truth)}">'
    verdict = f'<span class="{"good" if right else "bad"}">{"right" if right else "wrong"}</span>'
    truth = "" if right else f", it is {escape(example.truth)}"
    return (
        f'<div class="card">{shown}<small>{verdict} at exit {example.exit}: {escape(example.said)} '
        f"({100 * example.probability:.0f} %){truth}</small></div>"
    )


def _provenance(report: Report) -> str:
    rows = [(part.what, str(part.rows), part.source) for part in report.parts]
    found = ["<section><h2>What was fitted and tested on what</h2>"]
    if rows:
        found.append(_rows(("rows for", "how many", "which"), rows).replace("<table>", '<table class="words">'))
    said = [f"{policy.name}: {policy.message}" for policy in report.policies if policy.message]
    items = "".join(f"<li>{escape(text)}</li>" for text in (*said, *report.notes))
    found.append(f"<ul>{items}</ul>" if items else "")
    if report.command:
        found.append(f"<details open><summary>Made by</summary><p><code>{escape(report.command)}</code></p></details>")
    return "".join((*found, "</section>"))


def _footer(report: Report) -> str:
    parts = [f"timed on {report.machine}" if report.machine else "", ", ".join(map(" ".join, report.versions.items()))]
    return "; ".join(part for part in parts if part)


class _Cell(str):
    """A cell of a table with a class of its own."""

    def __new__(cls, text: str, kind: str) -> "_Cell":
        made = super().__new__(cls, text)
        made.kind = kind
        return made

    kind: str


def _section(title: str, about: str, figure: str, table: str) -> str:
    return (
        f"<section><h2>{escape(title)}</h2><p>{escape(about)}</p>{figure}"
        f"<details><summary>The numbers</summary>{table}</details></section>"
    )


def _missing(title: str, why: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(why)}</p></section>"


def _rows(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    return f'<td class="{text.kind}">{escape(text)}</td>' if isinstance(text, _Cell) else f"<td>{escape(text)}</td>"


def _pc(share: float) -> str:
    return f"{100 * share:.1f} %"
