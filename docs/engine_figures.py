"""The tables of engines in docs/engines.md, from what `offramp bench` and experiments/ours/engines.py wrote.

python docs/engine_figures.py results/engines-sst2.json
python docs/engine_figures.py results/engines-sst2-parity.json
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


def main() -> None:
    """Prints Markdown."""
    for path in map(Path, sys.argv[1:]):
        value = json.loads(path.read_text(encoding="utf-8"))
        lines = _bench(value["fields"]) if value.get("kind") == "offramp.bench" else _parity(value)
        print("\n".join([*lines, ""]))


def _bench(found: dict[str, Any]) -> list[str]:
    """One row for each engine and policy; a column for each batch size."""
    cells, sizes = defaultdict(dict), sorted({cell["batch_size"] for cell in found["cells"]})
    for cell in found["cells"]:
        cells[f"{cell['engine']}:{cell['precision']}", cell["policy"]][cell["batch_size"]] = cell
    lines = [
        "| engine | policy | " + " | ".join(f"batch {size}" for size in sizes) + " | right | less plain |",
        "|---|---|" + "---|" * (len(sizes) + 2),
    ]
    for (engine, policy), row in cells.items():
        told = [_cell(row[size]) if size in row else "" for size in sizes]
        last = row[max(row)]
        right, lost = last["accuracy"], last["lost"]
        lines.append(
            f"| `{engine}` | {policy} | {' | '.join(told)} | {100 * right['value']:.1f} | {100 * lost['value']:+.1f} "
            f"({100 * lost['low']:+.1f} to {100 * lost['high']:+.1f}) |"
        )
    lines += ["", "| engine | " + " | ".join(f"none taken, batch {size}" for size in sizes) + " |"]
    lines.append("|---|" + "---|" * len(sizes))
    unused: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in found["cells"]:
        if cell["unused_time"] is not None:
            unused[f"{cell['engine']}:{cell['precision']}"][cell["batch_size"]].append(cell["unused_time"])
    for engine, times in unused.items():
        told = [", ".join(f"{time:.2f}" for time in times[size]) for size in sizes]
        lines.append(f"| `{engine}` | {' | '.join(told)} |")
    return [f"{found['machine']}", "", *lines]


def _cell(cell: dict[str, Any]) -> str:
    return f"**{cell['speedup']:.2f}x** ({100 * cell['kept']:.0f} %), {cell['eager_speedup']:.1f}x"


def _parity(value: dict[str, Any]) -> list[str]:
    """One row for each engine, summed over policies; one for the accuracy of each exit in each precision."""
    lines = [
        "| engine | policies | rows compared | near a decision (differ) | others that differ |",
        "|---|---|---|---|---|",
    ]
    for engine in dict.fromkeys(row["engine"] for row in value["parity"]):
        mine = [row for row in value["parity"] if row["engine"] == engine]
        compared, near, moved, differ = (
            f"{sum(row[name] for row in mine):,}" for name in ("compared", "near", "near_differ", "differ")
        )
        lines.append(f"| `{engine}` | {len(mine)} | {compared} | {near} ({moved}) | {differ} |")
    lines += ["", "| precision | accuracy per exit, % |", "|---|---|"]
    for precision, exits in value["accuracy_per_exit"].items():
        lines.append(f"| {precision} | {' '.join(f'{100 * right:.1f}' for right in exits)} |")
    return lines


if __name__ == "__main__":
    main()
