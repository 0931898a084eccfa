"""A bench as one HTML file that asks nothing of the network: plots, and every figure in a table."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from offramp.artefacts import write_atomically
from offramp.bench.value import Bench, Cell, Rate
from offramp.report.page import as_script, plotly_script

__all__ = ["page_html", "write_page"]


def page_html(found: Bench) -> str:
    """The page: the answer first, then latency against accuracy, speed-ups, what was kept of the promise, single calls.

    Raises:
        MissingExtra: plotly is not installed.
    """
    page = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    fields = found.to_dict()["fields"]["cells"]
    for value, cell in zip(fields, found.cells, strict=True):
        value["name"] = cell.name
    sizes = sorted({cell.batch_size for cell in found.cells})
    settings = found.settings
    return page.substitute(
        title=escape(f"Engines with exits: {found.title}"),
        headline=escape(found.headline().replace(" %", "\u00a0%")),
        how=escape(
            f"{found.title}: in each cell all contenders took turns over the same batches of real rows, for about "
            f"{settings['seconds']:g} s, with {settings['threads']} thread(s). Families are calibrated to "
            f"{settings['fraction']:g} of the plain model's counted cost on {settings['fitted']} other rows, on each "
            f"engine's own logits; accuracy is of {settings['judged']} rows."
        ),
        sizes="".join(f'<button type="button" value="{size}" aria-pressed="false">{size}</button>' for size in sizes),
        body="".join(part(found) for part in (_answers, _speed, _kept, _tail, _engines)),
        footer=escape("; ".join((found.machine, ", ".join(map(" ".join, found.versions.items()))))),
        data=as_script(fields),
        plotly=plotly_script(),
    )


def write_page(found: Bench, path: str | Path) -> Path:
    """The path, after the page was written to it (atomically)."""
    text = page_html(found)

    def write(to: Path) -> None:
        to.write_text(text, encoding="utf-8")

    return write_atomically(path, write)


def _answers(found: Bench) -> str:
    rows = []
    for cell in found.cells:
        short, other = cell.shorter, found.instead(cell)
        cut = ("", "") if short.exit is None else (
            f"exit {short.exit}: {_pc(short.accuracy.value)}",  # type: ignore[union-attr]
            f"{short.took.median_ms / cell.live.median_ms:.2f}x",  # type: ignore[union-attr]
        )  # fmt: skip
        rows.append((
            *_which(cell), _rate(cell.accuracy), _points(cell.lost), _pc(cell.whole_accuracy.value),
            _pc(cell.plain_accuracy.value), *(cut if short.exit is not None else (short.note, "")),
            "nothing is as right" if other is None else other.what, "" if other is None else f"{other.ratio:.2f}x",
        ))  # fmt: skip
    return _section(
        "Accuracy against latency",
        "Filled marks are early exits; stars are whole models without exits, quantised ones among them; diamonds are "
        "the network cut at one exit that is at least as right as a policy. Up and to the left is better. Bars are "
        "95 % intervals: where they overlap, the difference may be chance.",
        "answers",
        ("engine", "policy", "batch", "right, 95 % interval", "less plain, paired", "whole, same engine", "plain",
         "cut at one exit", "live over it", "fastest as right, any engine", "live over it"),
        rows,
    )  # fmt: skip


def _speed(found: Bench) -> str:
    rows = [
        (
            *_which(c), f"{c.live.median_ms:.3f}", f"{c.live.spread_ms:.3f}", f"{c.whole.median_ms:.3f}",
            f"{c.eager.median_ms:.3f}", f"{c.live.rows_per_s:.0f}", f"{c.speedup:.2f}x", f"{c.eager_speedup:.2f}x",
            "" if c.unused_time is None else f"{c.unused_time:.2f}x", str(c.rounds),
            " ".join(f"{100 * share:.0f}" for share in c.shares),
        )
        for c in found.cells
    ]  # fmt: skip
    return _section(
        "Speed-up against the same engine without exits",
        "Above the dotted line exits pay. Heads, steps and regrouping are included. For eager, the model without exits "
        "is the faster of the original and its exported graph.",
        "speed",
        ("engine", "policy", "batch", "live ms", "spread", "whole ms", "torch eager ms", "rows/s", "speed-up",
         "against torch eager", "no exit taken", "rounds", "left at each exit, %"),
        rows,
    )  # fmt: skip


def _kept(found: Bench) -> str:
    rows = [(*_which(c), f"{c.promise:.2f}x", f"{c.speedup:.2f}x", f"{100 * c.kept:.0f} %") for c in found.cells]
    return _section(
        "What was kept of the promise",
        "The promise is plain time over the stages' times alone, each at the number of rows that reached it; heads, "
        "steps and regrouping take their part of it. Both are measured, so more than 100 % is noise.",
        "kept",
        ("engine", "policy", "batch", "promise", "speed-up", "kept"),
        rows,
    )


def _tail(found: Bench) -> str:
    tails = [cell for cell in found.cells if cell.tail is not None]
    if not tails:
        return ""
    rows = [
        (cell.name, cell.policy, str(tail.calls), str(tail.rows),
         *(f"{each:.2f}" for pair in zip(tail.live, tail.whole, strict=True) for each in pair))
        for cell in tails if (tail := cell.tail) is not None
    ]  # fmt: skip
    return _section(
        "Single rows",
        "One call after the other at batch 1. Rows that see every exit pay for all of them, which shows at p99.",
        "tail",
        ("engine", "policy", "calls", "rows", "p50 live", "whole", "p95 live", "whole", "p99 live", "whole"),
        rows,
    )


def _engines(found: Bench) -> str:
    rows = []
    for each in found.engines:
        made_on = {
            f"{t.made_on} logits{', as given' if t.status == 'as given' else ''}" for t in each.thresholds.values()
        } | {f"{name} with exits {', '.join(map(str, t.exits))}" for name, t in each.thresholds.items() if t.exits}
        memory = ("", "") if each.peak_mb is None else (f"{each.peak_mb:.0f}", f"{each.kept_mb:.0f}")
        rows.append((each.name, f"{each.made_s:.1f}", *memory, "; ".join(sorted(made_on)), each.why or "ran"))
    text = _table(
        ("engine", "seconds to first answers", "peak MB", "kept MB", "thresholds made on", "how it went"), rows
    )
    about = (
        "Each engine ran in a process of its own where it was benched on the command line; memory is what that process "
        "grew by, making the engine included, while every exit was visited at the largest batch."
    )
    foreign = [
        (each.name, name, _pc(f.changed), _rate(f.accuracy), f"{f.cost:.3f}", _rate(f.own_accuracy),
         f"{f.own_cost:.3f}")
        for each in found.engines for name, f in each.foreign.items()
    ]  # fmt: skip
    if foreign:
        text += "<p>Thresholds of the model's own precision on another's logits, and ones made on those logits:</p>"
        text += _table(
            ("engine", "policy", "leave at another exit", "right", "cost", "own ones: right", "cost"), foreign
        )
    return f"<section><h2>Engines</h2><p>{about}</p>{text}</section>"


def _which(cell: Cell) -> tuple[str, str, str]:
    return cell.name, cell.policy, str(cell.batch_size)


def _section(title: str, about: str, figure: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return (
        f"<section><h2>{escape(title)}</h2><p>{escape(about)}</p>"
        f'<div class="fig" id="{figure}" role="img" aria-label="{escape(title)}"></div>'
        f"<details><summary>The numbers</summary>{_table(head, rows)}</details></section>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    columns = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{columns}</tr>{body}</table></div>'


def _cell(text: str) -> str:
    words = ' class="words"' if len(text) > 40 else ""
    return f"<td{words}>{escape(text)}</td>"


def _rate(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} % ({100 * rate.low:.1f} to {100 * rate.high:.1f})"


def _points(rate: Rate) -> str:
    return f"{100 * rate.value:+.1f} ({100 * rate.low:+.1f} to {100 * rate.high:+.1f})"


def _pc(share: float) -> str:
    return f"{100 * share:.1f} %"
