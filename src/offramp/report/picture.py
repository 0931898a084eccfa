"""The report's main figure as SVG or PNG, for a README."""

from pathlib import Path
from typing import Any

from offramp.artefacts import write_atomically
from offramp.errors import MissingExtra, ValueRangeError
from offramp.report.colours import colour_of, shades
from offramp.report.value import Report

__all__ = ["to_picture"]


def to_picture(report: Report, path: str | Path) -> Path:
    """The path, after accuracy against cost, and measured speed-ups where there are any, were drawn to it.

    Args:
        path: ends in .svg, .png or .pdf.

    Raises:
        ValueRangeError: another ending.
        MissingExtra: matplotlib is not installed.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("svg", "png", "pdf"):
        raise ValueRangeError(f"{path} ends in {path.suffix!r}; expected .svg, .png or .pdf.")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("pictures need matplotlib: pip install 'offramp[report]'.") from None
    timed = [policy for policy in report.policies if policy.live]
    figure = Figure(figsize=(11 if timed else 6.4, 4.4), layout="constrained")
    axes: Any = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
    _curve(axes[0], report)
    if timed:
        _speeds(axes[1], report)
    figure.suptitle(report.headline(), fontsize=13, fontweight="bold", x=0.01, ha="left")
    # the same figure is the same file
    extra: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {}
    write_atomically(path, lambda to: figure.savefig(to, format=kind, dpi=150, **extra))
    return path


def _curve(axes: Any, report: Report) -> None:
    for family in dict.fromkeys(point.family for point in report.curve):
        points = sorted((p for p in report.curve if p.family == family), key=lambda p: p.cost)
        costs, colour = [p.cost for p in points], colour_of(family)
        axes.fill_between(costs, [100 * p.low for p in points], [100 * p.high for p in points], color=colour, alpha=0.1)
        axes.plot(costs, [100 * p.value for p in points], "o-", color=colour, label=family, markersize=4)
    if report.metric == "accuracy":
        alone = report.exits
        axes.plot(
            [e.cost for e in alone], [100 * e.accuracy for e in alone], "D", color="#999999", label="one exit for all",
            markersize=5, markerfacecolor="none",
        )  # fmt: skip
    axes.axhline(100 * report.plain[0], color="#555555", linestyle="--", linewidth=1)
    axes.plot([1.0], [100 * report.plain[0]], "*", color="#222222", markersize=12, label="plain model")
    axes.set_xlabel("mean cost of a row, of the plain model's FLOPs (counted)")
    axes.set_ylabel(f"{report.metric.replace('-', ' ')} on unseen rows, %")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    _bare(axes)


def _speeds(axes: Any, report: Report) -> None:
    timed = [policy for policy in report.policies if policy.live]
    sizes = sorted({live.batch_size for policy in timed for live in policy.live})
    width, colours = 0.8 / len(timed), shades((policy.name, policy.family) for policy in timed)
    for place, policy in enumerate(timed):
        at = [sizes.index(live.batch_size) + (place - (len(timed) - 1) / 2) * width for live in policy.live]
        axes.bar(at, [live.speedup for live in policy.live], width * 0.9, color=colours[policy.name], label=policy.name)
        promised = [(x, live.promise) for x, live in zip(at, policy.live, strict=True) if live.promise is not None]
        for x, promise in promised:
            axes.plot([x - width * 0.45, x + width * 0.45], [promise, promise], color="#222222", linewidth=1.2)
    axes.axhline(1.0, color="#555555", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("rows in a batch; the black lines are what the stages alone promise")
    axes.set_ylabel("measured speed-up")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    _bare(axes)


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
