"""What every page of results is written with: where results are, tables, and figures with their intervals."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
NAMES = {
    "entropy": "entropy (DeeBERT, BranchyNet)", "patience": "patience (PABEE)", "f-pabee": "F-PABEE", "ztw": "ZTW",
    "jei-dnn": "JEI-DNN", "eenet": "EENet", "beem-c": "BEEM-C", "beem-a": "BEEM-A", "max-prob": "max-prob",
    "msdnet": "MSDNet's rule", "stopping": "stopping (ours)",
}  # fmt: skip
TASKS = {"sst2": "SST-2, 20,000 rows", "sst2-full": "SST-2", "rte": "RTE", "mrpc": "MRPC", "cola": "CoLA",
         "qnli": "QNLI", "ag_news": "AG News"}  # fmt: skip
NOTHING = ["Not measured yet."]


def loaded(*path: str) -> dict[str, Any] | None:
    """A result, None when it is not there yet."""
    file = RESULTS.joinpath(*path)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def grid(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(each)} |" for each in (head, ["---"] * len(head), *rows)]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def points(found: dict[str, float]) -> str:
    """A difference in points with its interval."""
    return f"{100 * found['value']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"
