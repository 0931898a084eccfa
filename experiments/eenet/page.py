"""EENet's tables, for docs/results.md."""

from typing import Any

from experiments.page import NAMES, NOTHING, grid, loaded, percent, points


def eenet(name: str) -> list[str]:
    """EENet's table of a network."""
    found = loaded("eenet", f"{name}.json")
    if not found:
        return NOTHING
    lines, plain = list[str](), loaded("eenet", f"{name}-plain.json")
    if plain:
        lines = [f"Before any exit was put on it the network was right at {percent(plain['accuracy'])} %.", ""]
    for exits, table in found["tables"].items():
        alone = " ".join(percent(e["accuracy"]) for e in table["exits"])
        costs = " ".join(f"{100 * c:.0f}" for c in table["cumulative"])
        lines += [f"{exits[0].upper()}{exits[1:]}: alone {alone} %, at {costs} % of the cost; {table['held_out']} "
                  "rows.", ""]  # fmt: skip
        groups: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}
        for row in table["rows"]:
            groups.setdefault((row["unit"], row["batch_size"]), {}).setdefault(row["family"], []).append(row)
        for (unit, size), families in groups.items():
            by = "FLOPs" if unit == "fraction" else f"milliseconds at batch {size}"
            rows = [
                [NAMES[f], *(f"{percent(r['accuracy'])} at {r['cost']:.2f}, {points(r['less_eenet'])}" for r in each)]
                for f, each in families.items()
            ]
            lines += [*grid([by, *(f"{100 * b:.0f} %" for b in found["budgets"])], rows), ""]
    return lines[:-1]


def checks(_: str) -> list[str]:
    """Networks whose whole training needs a GPU: that they are attached, cut, trained and recorded."""
    rows = []
    for name, what in (("resnet56", "ResNet-56 of bottlenecks, three exits"),
                       ("densenet121", "DenseNet-121, four exits"), ("msdnet", "MSDNet, five exits")):  # fmt: skip
        found = loaded("eenet", f"check-{name}.json")
        if found:
            losses = [each["loss"] for each in found["report"]["epochs"]]
            rows.append([
                what, f"{found['recipe']['epochs']} of {found['rows']} images", f"{found['report']['seconds']:.0f} s",
                f"{losses[0]:.2f}", " ".join(percent(each) for each in found["accuracy"]),
                " ".join(f"{100 * each:.0f}" for each in found["cumulative"]),
            ])  # fmt: skip
    head = ["network", "epochs", "time", "mean loss", "exits right, %", "at % of the cost"]
    return grid(head, rows) if rows else NOTHING


def hours() -> list[list[str]]:
    """How long the trainings took, by network."""
    rows = []
    for name in ("basic-0", "tuned-0"):
        cell = loaded("eenet", f"{name}.json")
        if cell:
            rows.append([f"CIFAR-10, {name}", "1", f"{cell['report']['seconds'] / 3600:.1f} h", cell["machine"]])
    return rows
