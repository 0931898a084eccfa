"""The pictures of docs/policies.md, by hand: `python docs/policy_figures.py`.

Reads the recorded SST-2 rows and costs under results/, calibrates every policy on one half of the rows, and draws what
it decides about three rows of the other half into docs/policies/NAME.svg.
"""

import io
import re
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from offramp.artefacts import write_atomically
from offramp.choices import CHOICES, calibrator_of, families_for
from offramp.cost import Budget, CostModel
from offramp.policies import FPABEE, PCEE, Policy, Stopping
from offramp.policies.base import at_exit
from offramp.policies.fpabee import divergence
from offramp.scores import neg_entropy
from offramp.simulate import Outcome, Walk, simulate, walk
from offramp.trace import ExitTrace

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "policies"
RIGHT, WRONG, LINE = "#0072B2", "#D55E00", "#444444"
DASHES: Any = (0, (3, 1.2))
#: On other halves Stopping may come out as max-prob, whose picture would be drawn twice.
SEED = 1
#: Half of the plain model's cost; at that, those that count would let all rows leave at one and the same exit.
BUDGETS = {"patience": 0.6, "f-pabee": 0.6, "pcee": 0.6, "voting": 0.6}
#: A score below this stands for "cannot leave here".
NEVER = -1e5
SCORES = {
    "max-prob": "largest probability",
    "entropy": "1 - entropy / log classes",
    "margin": "first less second",
    "patience": "agreements in a row",
    "f-pabee": "still exits in a row",
    "pcee": "sure exits in a row",
    "voting": "share of equal votes",
    "msdnet": "largest probability",
    "eero": "largest probability",
    "beem-c": "evidence S",
    "beem-a": "evidence S",
    "eenet": "learned score",
    "ztw": "sureness of the mixture",
    "jei-dnn": "gate",
    "berxit": "learned certainty",
    "accuracy-bins": "accuracy of the bin",
    "fixed": "score",
    "stopping": "sureness of the mixture",
}


class Band(NamedTuple):
    """One row of panels: what is compared with what at every visited exit."""

    label: str
    score: torch.Tensor  # [visit row]
    thresholds: list[float]  # one per early visited exit
    name: str


class Drawn(NamedTuple):
    """One calibrated policy, and what it does with the rows that were not used for it."""

    policy: Policy
    walked: Walk
    outcome: Outcome


def main() -> None:
    """Every picture."""
    torch.set_num_threads(1)
    matplotlib.rcParams |= {"svg.hashsalt": "offramp", "svg.fonttype": "none", "font.size": 8, "axes.linewidth": 0.6}
    matplotlib.rcParams["font.sans-serif"] = ["DejaVu Sans", "Verdana", "Arial"]
    costs = CostModel.load(ROOT / "results" / "costs-sst2-1-thread.json")
    fit, rest = ExitTrace.load(ROOT / "results" / "sst2-minilm-validation.safetensors").split((0.5, 0.5), seed=SEED)
    found: dict[str, Drawn] = {}
    for name in families_for(fit):
        policy = calibrator_of(name, fit, costs).to(Budget(fraction=BUDGETS.get(name, 0.5))).policy
        found[name] = Drawn(policy, walk(policy, rest), simulate(policy, rest, costs))
    rows = chosen(found, rest)
    print("rows", {kind: rest.ids[row] if rest.ids else row for kind, row in rows.items()})
    OUT.mkdir(exist_ok=True)
    for name in CHOICES:
        if name not in found:
            print(f"{name}: no picture, the recorded rows have no signal {', '.join(CHOICES[name][0].needs)}")
            continue
        to = draw(name, found[name], rest, rows)
        exits = [int(found[name].outcome.exit[row]) for row in rows.values()]
        print(
            f"{to.relative_to(ROOT)}: {to.stat().st_size / 1000:.0f} kB, exits {exits}, {settings(found[name].policy)}"
        )


def chosen(found: dict[str, Drawn], trace: ExitTrace) -> dict[str, int]:
    """Three rows, the same in every picture: the first of those that fit each kind under most policies."""
    said = trace.logits.argmax(dim=-1)
    right = said == trace.known_labels("the pictures")
    exits = torch.stack([one.outcome.exit for one in found.values()])
    flips = (said[1:] != said[:-1]).sum(dim=0)
    differ = torch.tensor([len(row.unique()) for row in exits.T])
    first = (exits <= 1).sum(dim=0) * (right.all(dim=0))
    turns = (differ + (exits == trace.exits - 1).any(dim=0)) * ((flips == 1) & right[-1] & ~right[0] & ~right[1])
    last = (exits == trace.exits - 1).sum(dim=0)
    kinds = {"easy": first, "changes its mind": turns, "hard": last}
    return {kind: int(measure.argmax()) for kind, measure in kinds.items()}


def settings(policy: Policy) -> str:
    """What was calibrated, for the terminal."""
    names = ("tau", "patience", "thresholds", "enabled", "exit")
    return ", ".join(f"{name} {getattr(policy, name)}" for name in names if hasattr(policy, name))


def bands(name: str, one: Drawn, trace: ExitTrace) -> list[Band]:
    """What the picture of a policy shows: its score, and what a count counts."""
    policy: Any = one.policy
    early = one.walked.visited[:-1]
    thresholds = [at_exit(policy.thresholds, k) for k in early]
    label = "gate" if isinstance(policy, Stopping) and policy.gates is not None else SCORES[name]
    counts = isinstance(policy, FPABEE | PCEE) or name == "patience"
    shown = [Band(label, one.walked.score, thresholds, "patience" if counts else "threshold")]
    logits = trace.logits[list(one.walked.visited)]
    if isinstance(policy, FPABEE):
        moved = torch.stack([divergence(a, b, policy.measure, policy.task) for a, b in pairwise(logits)])
        moved = torch.cat([torch.full_like(moved[:1], 10 * NEVER), moved])
        shown.insert(0, Band("movement D", moved, [policy.tau] * len(early), "tau"))
    if isinstance(policy, PCEE):
        shown.insert(0, Band("1 - entropy / log classes", neg_entropy(logits), [policy.tau] * len(early), "tau"))
    return shown


def draw(name: str, one: Drawn, trace: ExitTrace, rows: dict[str, int]) -> Path:
    """The path, after a policy's three rows were drawn to it."""
    shown = bands(name, one, trace)
    figure = Figure(figsize=(7.6, 1.2 + 1.25 * len(shown)), layout="constrained", facecolor="white")
    axes: Any = figure.subplots(len(shown), len(rows), squeeze=False, sharex=True, sharey="row")
    for band, line in zip(shown, axes, strict=True):
        for panel, row in zip(line, rows.values(), strict=True):
            curve(panel, band, one, row, trace)
        line[0].set_ylabel(band.label)
        line[0].set_ylim(*limits(band, list(rows.values())))
        if band.name == "patience":
            line[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    for panel, (kind, row) in zip(axes[0], rows.items(), strict=True):
        end = "right" if one.outcome.right is not None and one.outcome.right[row] else "wrong"
        last = int(one.outcome.exit[row])
        way = "runs to the end" if last == trace.exits - 1 else f"out at exit {last}"
        panel.set_title(f"{kind}: {way}, {end}", fontsize=8.5)
    visited = one.walked.visited
    for panel in axes[-1]:
        panel.set_xticks(range(trace.exits), [str(k) if k in visited else "off" for k in range(trace.exits)])
    axes[-1][1].set_xlabel("exit")
    legend(figure, [band.name for band in shown])
    OUT.mkdir(exist_ok=True)
    about: dict[str, Any] = {"metadata": {"Date": None, "Title": f"{name} on three rows"}}
    return write_atomically(OUT / f"{name}.svg", lambda to: save(figure, to, about))


def save(figure: Figure, path: Path, about: dict[str, Any]) -> None:
    """Nothing; the figure is in the file, without what makes it large: indents, comments, a millionth of a point."""
    text = io.StringIO()
    figure.savefig(text, format="svg", **about)
    kept = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    kept = re.sub(r"(\d\.\d\d)\d+", r"\1", kept)
    path.write_text("\n".join(line.strip() for line in kept.splitlines() if line.strip()) + "\n", encoding="utf-8")


def limits(band: Band, rows: list[int]) -> tuple[float, float]:
    """From the least to the largest of what is seen, and a little more."""
    seen = [v for v in band.score[:, rows].flatten().tolist() if v > NEVER]
    near = max(seen) - min(seen) or 1.0
    seen += [t for t in band.thresholds if min(seen) - near < t < max(seen) + near]
    low, high = min(seen), max(seen)
    room = 0.12 * (high - low) or 0.5
    return low - room, high + room


def curve(panel: Any, band: Band, one: Drawn, row: int, trace: ExitTrace) -> None:
    """One row's score at every visited exit: as far as it went, and faintly what would have come."""
    visited = one.walked.visited
    scores = band.score[:, row].tolist()
    said = one.walked.answer[:, row].argmax(dim=-1)
    good = (said == trace.known_labels("the pictures")[row]).tolist()
    leaves = visited.index(int(one.outcome.exit[row]))
    panel.plot(*steps(visited[:-1], band.thresholds), color=LINE, linewidth=1.1, linestyle=DASHES)
    kept = [i for i, score in enumerate(scores) if score > NEVER]
    gone, ahead = [i for i in kept if i <= leaves], [i for i in kept if i >= leaves]
    panel.plot([visited[i] for i in ahead], [scores[i] for i in ahead], color="#bbbbbb", linewidth=0.8, zorder=1)
    panel.plot([visited[i] for i in gone], [scores[i] for i in gone], color="#777777", linewidth=1.2, zorder=2)
    for is_right, place in product((True, False), (-1, 0, 1)):  # place: before, at and after the exit taken
        marks = [i for i in kept if good[i] == is_right and (i > leaves) - (i < leaves) == place]
        colour = RIGHT if is_right else WRONG
        panel.plot(
            [visited[i] for i in marks], [scores[i] for i in marks], "o" if is_right else "X", color=colour, zorder=3,
            markersize=5.5 if place else 7.5, markerfacecolor="white" if place else colour,
            alpha=0.35 if place > 0 else 1.0,
        ) if marks else None  # fmt: skip
    for i in set(range(len(scores))) - set(kept):
        words = {"ha": "center", "fontsize": 6.5, "color": LINE, "transform": panel.get_xaxis_transform()}
        panel.text(visited[i], 0.06, "none\nyet", **words)
    panel.set_xlim(-0.5, trace.exits - 0.5)
    panel.spines[["top", "right"]].set_visible(False)


def steps(visited: Sequence[int], thresholds: list[float]) -> tuple[list[float], list[float]]:
    """(x, y) of a line that is level at every exit, with a gap where an exit is off."""
    x: list[float] = []
    y: list[float] = []
    for k, threshold in zip(visited, thresholds, strict=True):
        if x and x[-1] != k - 0.5:
            x, y = [*x, float("nan")], [*y, float("nan")]
        x, y = [*x, k - 0.5, k + 0.5], [*y, threshold, threshold]
    return x, y


def legend(figure: Any, names: list[str]) -> None:
    """What the marks mean, once for all panels."""
    marks = [
        Line2D([], [], color=RIGHT, marker="o", markerfacecolor="white", linestyle="", label="right, goes on"),
        Line2D([], [], color=WRONG, marker="X", markerfacecolor="white", linestyle="", label="wrong, goes on"),
        Line2D([], [], color="#222222", marker="o", linestyle="", label="filled: leaves here"),
        Line2D([], [], color="#bbbbbb", marker="o", markerfacecolor="white", label="faint: never computed"),
        Line2D([], [], color=LINE, linestyle=DASHES, label=" and ".join(dict.fromkeys(names))),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=5, frameon=False, fontsize=7.5, columnspacing=1.4)


if __name__ == "__main__":
    main()
