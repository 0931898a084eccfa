"""A comparison of policies as one HTML file: the frontiers, the differences, and every figure in a table."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from offramp.artefacts import write_atomically
from offramp.report.colours import colour_of
from offramp.report.page import as_script, plotly_script

__all__ = ["frontier_html", "write_frontier"]

#: Curves that are drawn at first; the legend shows the others.
SHOWN = ("max-prob", "beem-a", "beem-c", "eenet", "msdnet", "stopping", "ztw", "fixed")


def frontier_html(value: Mapping[str, Any]) -> str:
    """The page of what `offramp compare --json` gives.

    Raises:
        MissingExtra: plotly is not installed.
    """
    page = Template((Path(__file__).parent / "frontier.html").read_text(encoding="utf-8"))
    return page.substitute(
        title="Policies on equal exits",
        how=escape(str(value["how"])),
        body="".join((_figures(value), _families(value), _rows(value), _exits(value))),
        data=as_script({"baseline": value["baseline"], "curves": list(_curves(value))}),
        plotly=plotly_script(),
    )


def write_frontier(value: Mapping[str, Any], path: str | Path) -> Path:
    """The path, after the page was written to it (atomically)."""
    text = frontier_html(value)

    def write(to: Path) -> None:
        to.write_text(text, encoding="utf-8")

    return write_atomically(path, write)


def _curves(value: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    rows = [row for row in value["rows"] if row["budget"] is not None] or value["rows"]
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = sorted((row for row in rows if row["family"] == family), key=lambda row: row["cost"])
        about = {
            "family": family,
            "colour": colour_of(family),
            "shown": family in SHOWN,
            "x": [r["cost"] for r in mine],
        }
        yield {
            **about,
            "kind": "accuracy",
            "y": [100 * row["accuracy"] for row in mine],
            "low": None,
            "text": [_told(row) for row in mine],
        }
        if family != value["baseline"] and all(row["difference"] is not None for row in mine):
            yield {
                **about,
                "kind": "difference",
                "y": [100 * row["difference"] for row in mine],
                "low": [100 * (row["difference"] - row["difference_low"]) for row in mine],
                "high": [100 * (row["difference_high"] - row["difference"]) for row in mine],
                "text": [_told(row) for row in mine],
            }


def _told(row: Mapping[str, Any]) -> str:
    return f"{escape(row['target'])}: {100 * row['accuracy']:.2f} % at {row['cost']:.3f}"


def _figures(value: Mapping[str, Any]) -> str:
    return (
        "<section><h2>Accuracy at a cost</h2><p>On rows that no policy was fitted or certified on. Families that are "
        'not drawn can be switched on in the legend.</p><div class="fig" id="frontier"></div></section>'
        f"<section><h2>Less {escape(value['baseline'])}, row by row</h2><p>Paired over the same rows, with 95 % "
        "bootstrap intervals. An interval that holds 0 says nothing.</p>"
        '<div class="fig" id="difference"></div></section>'
    )


def _families(value: Mapping[str, Any]) -> str:
    rows = [
        (
            row["family"], _percent(row["area"]), _number(row["failure_prediction"]),
            f"{row['better']} of {row['budgets']}", f"{row['worse']} of {row['budgets']}",
        )
        for row in value["families"]
    ]  # fmt: skip
    head = ("policy", "area under frontier", "failure prediction (AUROC)", "beyond noise better", "beyond noise worse")
    return _section("Families", "Over all budgets, against " + value["baseline"] + ".", head, rows)


def _rows(value: Mapping[str, Any]) -> str:
    head = (
        "policy", "target", "status", "cost", "accuracy", "95 % interval", "difference", "its interval", "lost",
        "oracle regret", "random, same shares", "left at each exit",
    )  # fmt: skip
    rows = [
        (
            row["family"], row["target"].removesuffix(" of the plain model"), row["status"], f"{row['cost']:.3f}",
            _percent(row["accuracy"]), f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
            "" if row["difference"] is None else f"{100 * row['difference']:+.2f}",
            ""
            if row["difference"] is None
            else f"{100 * row['difference_low']:+.2f} to {100 * row['difference_high']:+.2f}",
            _percent(row["lost"]), f"{100 * row['regret']:.1f}", _percent(row["random"]),
            " ".join(f"{100 * share:.0f}" for share in row["shares"]),
        )
        for row in value["rows"]
    ]  # fmt: skip
    about = "Lost: rows that the plain model has right and the policy wrong. The oracle knows which exits are right."
    return _section("Every policy at every target", about, head, rows)


def _exits(value: Mapping[str, Any]) -> str:
    rows = [
        (
            str(row["exit"]), f"{row['cost']:.3f}", _percent(row["accuracy"]), f"{row['ece']:.3f}",
            _number(row["eefp"]), _percent(row["overthinking"]),
        )
        for row in value["exits"]
    ]  # fmt: skip
    head = ("exit", "cost", "accuracy", "ECE", "failure prediction", "right here, wrong at the end")
    about = f"Overthinking: {_percent(value['overthinking'])} of rows are right at an early exit and wrong at the end."
    return _section("Exits alone", about, head, rows)


def _section(title: str, about: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    columns = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<section><h2>{escape(title)}</h2><p>{escape(about)}</p>"
        f'<div class="scroll"><table><tr>{columns}</tr>{body}</table></div></section>'
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
