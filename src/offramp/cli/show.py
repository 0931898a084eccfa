"""What commands write: results on standard output, everything else on standard error."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "as_json", "compared", "compared_rows", "is_first", "is_quiet", "line", "note", "percent", "percents", "result",
    "set_quiet", "table",
]  # fmt: skip

_QUIET = [False]
WIDTH = 120  # of tables where no terminal says its own


def line(text: str) -> None:
    """Nothing; the text is a line of the result."""
    print(text)


def is_first() -> bool:
    """Whether this process tells what happens and writes results, where a launcher started several."""
    return int(os.environ.get("WORLD_SIZE", "1")) < 2 or os.environ.get("RANK", "0") == "0"


def set_quiet(quiet: bool) -> None:
    """Nothing; from now on only warnings and errors are on standard error, and no progress."""
    _QUIET[:] = [quiet or not is_first()]


def is_quiet() -> bool:
    """Whether only warnings and errors are wanted on standard error."""
    return _QUIET[0]


def note(text: str) -> None:
    """Nothing; the text is a line on standard error, unless it is no warning or error and they alone are wanted."""
    if not _QUIET[0] or text.startswith(("error", "warning", "interrupted")):
        print(text, file=sys.stderr, flush=True)


def as_json(value: Any) -> str:
    """The value as indented JSON, without NaN or infinities."""
    return json.dumps(value, indent=2, allow_nan=False)


def result(value: Mapping[str, Any], lines: Iterable[str], json_out: bool) -> None:
    """Nothing; the result is on standard output, as JSON or as lines for a person."""
    if not is_first():
        return
    if json_out:
        line(as_json(value))
        return
    for text in lines:
        line(text)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Nothing; the table is on standard output."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    line(title)  # not the table's own title, which would be wrapped to its width
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*map(escape, row))
    console.print(made)


def percent(share: float) -> str:
    """A share as "12.3 %"."""
    return f"{100 * share:.1f} %"


def percents(shares: Iterable[float]) -> str:
    """Shares as "50 25 25 %"."""
    return " ".join(f"{100 * share:.0f}" for share in shares) + " %"


def compared_rows(rows: Iterable[Any]) -> list[dict[str, Any]]:
    """Rows of `offramp.compare` as JSON objects."""
    from offramp.policies import to_dict

    found = []
    for row in rows:
        values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
        found.append({**values, "policy": to_dict(row.policy)})
    return found


def compared(rows: Sequence[Any], title: str) -> None:
    """Nothing; rows of `offramp.compare` are on standard output as a table, its warnings on standard error."""
    other = bool(rows) and rows[0].metric != "accuracy"
    versus = any(row.difference is not None for row in rows)
    table(
        title,
        (
            "policy",
            "target",
            "status",
            "cost",
            "accuracy",
            "95 % interval",
            "plain",
            *(("less max-prob",) if versus else ()),
            *((rows[0].metric, "95 % interval", "plain") if other else ()),
            "left at each exit",
        ),
        (
            (
                row.family,
                row.target.removesuffix(" of the plain model"),
                row.status,
                f"{row.cost:.3f}",
                percent(row.accuracy),
                f"{100 * row.low:.1f} to {100 * row.high:.1f}",
                percent(row.plain),
                *((_difference(row),) if versus else ()),
                *(
                    (
                        percent(row.value),
                        f"{100 * row.value_low:.1f} to {100 * row.value_high:.1f}",
                        percent(row.value_plain),
                    )
                    if other
                    else ()
                ),
                percents(row.shares),
            )
            for row in rows
        ),
    )
    for text in dict.fromkeys(f"{row.family}: {row.warning}" for row in rows if row.warning):
        note(f"warning: {text}")


def _difference(row: Any) -> str:
    """The difference to max-prob in points, with its interval; a star where it is beyond noise."""
    if row.difference is None:
        return ""
    star = "*" if row.difference_low > 0 or row.difference_high < 0 else " "
    low, high = 100 * row.difference_low, 100 * row.difference_high
    return f"{100 * row.difference:+.2f} [{low:+.1f} {high:+.1f}]{star}"
