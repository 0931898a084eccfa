"""BEEM's table, the ablation of recipes, and what was measured, for docs/results.md."""

from pathlib import Path
from typing import Any

from experiments.page import NAMES, NOTHING, TASKS, grid, loaded, percent, points

from offramp.artefacts import write_atomically

RECIPES = {
    "taught": "fine-tuned first, then taught by it (the base)", "taught-labels": "labels alone, no teacher",
    "taught-pure": "the teacher alone, no labels", "taught-self": "taught by the last exit instead",
    "taught-uniform": "every exit weighs the same", "taught-budget": "weights for budgets of 40 to 60 %",
    "taught-alternating": "last exit and all exits in turns (BERxiT)", "taught-equilibrium": "gradient equilibrium",
    "taught-detached": "exits' gradients stay in their heads", "taught-layer-decay": "earlier layers learn more slowly",
    "taught-attention": "attention heads", "taught-pooler": "a projection in every head",
    "taught-self-pooler": "taught by the last exit, a projection in every head", "taught-longer": "twice as long",
    "depth": "jointly from the start, depth weights (PABEE, BEEM)",
    "longer": "the same, for as long as the base in all (the default of `offramp.train`)",
    "longer-self": "jointly from the start, taught by the last exit, as long",
    "longer-pooler": "jointly from the start, depth weights, a projection in every head, as long",
    "longer-self-pooler":
        "jointly from the start, taught by the last exit, a projection in every head, as long (`offramp train`, texts)",
    "plain-first": "fine-tuned, then taught by the last exit, in one run",
    "heads-after": "heads alone on the frozen network (DeeBERT)",
}  # fmt: skip
EQUAL = 1.5  # epochs of the recipes that cost the same, as a multiple of the plain network's


def judged() -> list[dict[str, Any]]:
    """BEEM's table of every task and seed that is judged, with the budgets that they share."""
    table = loaded("beem", "table.json") or {"policies": [], "budgets": []}
    return [{**each, "budgets": table["budgets"]} for each in table["policies"]]


def networks(_: str) -> list[str]:
    """What a user would pick instead: the plain network, and its first layers fine-tuned alone; beside the exits."""
    rows = []
    for each in judged():
        metric = each["metric"]
        static = {name: each["static"].get(name) for name in ("static-2", "static-3", "static-4")}
        rows.append([
            TASKS[each["task"]], str(len(each["seeds"])), metric, str(each["held_out"]), str(each["repeats"]),
            spread(each["plain"], metric),
            *(spread(s, metric) if s else "" for s in static.values()),
            " ".join(percent(e[metric]) for e in each["exits"]),
        ])  # fmt: skip
    head = ["task", "seeds", "metric", "rows", "halves drawn", "plain", "2 layers", "3 layers", "4 layers"]
    head.append("exits 1 to 6")
    return grid(head, rows) if rows else NOTHING


def fewer(_: str) -> list[str]:
    """Fewer layers alone, by how they were trained: the tables hold exits against the last way."""
    cells = loaded("beem", "cells.json") or {}
    tasks = [task for task in TASKS if f"{task}-static-2-pooler-0" in cells]
    lines = []
    for name, text, epochs in (("", "means over tokens", "1.0"), ("-longer", "the same, for as long as exits", "1.5"),
                               ("-pooler", "with a projection, as long", "1.5")):  # fmt: skip
        rows = [[cells.get(f"{task}-static-{k}{name}-0") for k in (2, 3, 4)] for task in tasks]
        told = [" / ".join(percent(cell["accuracy"][0]) if cell else "" for cell in each) for each in rows]
        lines.append([text, epochs, *told])
    return (
        grid(["accuracy of 2 / 3 / 4 layers", "epochs", *(TASKS[task] for task in tasks)], lines) if tasks else NOTHING
    )


def spread(found: dict[str, Any], metric: str) -> str:
    """The mean over training seeds, with the lowest and the highest."""
    of_seeds = found.get(f"{metric}_of_seeds")
    more = f" ({percent(min(of_seeds))} to {percent(max(of_seeds))})" if of_seeds else ""
    return percent(found[metric]) + more


def beem(_: str) -> list[str]:
    """Every policy at accuracy at or above the last exit's on the calibration rows, judged on the others."""
    lines = []
    for each in judged():
        metric = each["metric"]
        lines += [
            f"**{titled(each)}** ({metric}, {each['held_out']} rows; last exit {percent(each['last'][metric])}, plain "
            f"{percent(each['plain'][metric])})", "",
        ]  # fmt: skip
        rows = [
            [NAMES[row["family"]], row["target"], spread(row, metric), f"{1 / row['cost']:.2f}x",
             points(row["less_plain"])]
            for row in each["rows"] if not any(part in row["target"] for part in ("of the plain", "under plain"))
        ]  # fmt: skip
        lines += [*grid(["policy", "thresholds from", metric, "counted speed-up", "accuracy less plain"], rows), ""]
    return lines[:-1] or NOTHING


def titled(each: dict[str, Any]) -> str:
    """The task, and of how many trainings the figures are means."""
    return TASKS[each["task"]] + (f", mean of {len(each['seeds'])} trainings" if len(each["seeds"]) > 1 else "")


def near(_: str) -> list[str]:
    """Every policy near the plain network: what is spent and lost when little may be lost."""
    head, by = ["policy"], dict[str, list[str]]()
    for each in judged():
        metric = each["metric"]
        head.append(f"{titled(each)}: {100 * each['margin']:.1f} points of {metric}")
        for row in each["rows"]:
            if "under plain" in row["target"]:
                lost = "" if metric == "accuracy" else f"{metric} {100 * (row[metric] - each['plain'][metric]):+.1f}, "
                by.setdefault(row["family"], []).append(
                    f"{1 / row['cost']:.2f}x, {lost}{points(row['less_plain'])}"
                )  # fmt: skip
    return grid(head, [[NAMES[family], *cells] for family, cells in by.items()]) if by else NOTHING


def static(_: str) -> list[str]:
    """Exits at the cost of networks of fewer layers, beside them."""
    lines = []
    for each in judged():
        metric = each["metric"]
        for name, other in each["static"].items():
            rows = [row for row in each["rows"] if row.get("static") == name]
            lines.append([
                TASKS[each["task"]], name.removeprefix("static-"), str(len(other.get(f"{metric}_of_seeds", [0]))),
                spread(other, metric), *(f"{percent(row[metric])}, {points(row['less_static'])}" for row in rows),
            ])  # fmt: skip
    head = ["task", "layers", "trainings", "alone", "max-prob at their cost, accuracy less theirs", "stopping (ours)"]
    return grid(head, lines) if lines else NOTHING


def budgets(_: str) -> list[str]:
    """Every policy at every budget: the metric, the cost spent, and the accuracy less the plain network's."""
    lines = []
    for each in judged():
        by: dict[str, list[str]] = {}
        for row in spent(each):
            by.setdefault(row["family"], []).append(
                f"{percent(row[each['metric']])} at {row['cost']:.2f}, {points(row['less_plain'])}"
            )  # fmt: skip
        head = [f"{titled(each)}", *(f"{100 * b:.0f} %" for b in each["budgets"])]
        lines += [f"![Accuracy over counted cost, {TASKS[each['task']]}](results/{each['task']}.svg)", ""]
        lines += [*grid(head, [[NAMES[family], *cells] for family, cells in by.items()]), ""]
    return lines[:-1] or NOTHING


def spent(each: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a task that are for the budgets of its table."""
    return [row for row in each["rows"] if "of the plain" in row["target"] and "static" not in row]


def recipes(_: str) -> list[str]:
    """The ablation: the mean over budgets and two policies, and the paired difference to the base recipe."""
    table = loaded("beem", "table.json")
    if not table or not any(table["recipes"].values()):
        return NOTHING
    found = {task: {row["variant"]: row for row in rows} for task, rows in table["recipes"].items() if rows}
    lines, beside = [], []
    for variant, text in RECIPES.items():
        rows = [each.get(variant) for each in found.values()]
        if not any(rows):
            continue
        epochs = next(row["epochs"] for row in rows if row)
        cells = ["" if row is None else percent(row["mean"]) if variant == "taught"
                 else f"{percent(row['mean'])}, {over(row['less_base'])}" for row in rows]  # fmt: skip
        lines.append([text, f"{epochs:.1f}", *cells])
        if epochs == EQUAL and variant != "longer":
            beside.append([text, *(over(row["less_default"]) if row and "less_default" in row else ""
                                   for row in rows)])  # fmt: skip
    tasks = [TASKS[task] for task in found]
    return [
        *grid(["recipe", "epochs", *tasks], lines), "",
        "At equal cost, against learning jointly for as long:", "", *grid(["recipe", *tasks], beside), "",
        *without(table["without"], list(found)),
    ]  # fmt: skip


def over(less: dict[str, Any]) -> str:
    """A difference, and of how many trainings it is the mean where it is of more than one."""
    return points(less) + (f", {less['trainings']} trainings" if less.get("trainings", 1) > 1 else "")


def without(told: dict[str, dict[str, Any]], tasks: list[str]) -> list[str]:
    """The network without exits, trained as long as the recipes."""
    lines = []
    for name, text in (("plain", "without exits"), ("plain-longer", "without exits, for as long as the base in all")):
        cells, epochs = list[str](), 0.0
        for row in (told.get(task, {}).get(name) for task in tasks):
            more = "" if row is None or name == "plain" else f", {over(row['less_plain'])}"
            cells.append("" if row is None else percent(row["accuracy"]) + more)
            epochs = epochs if row is None else row["epochs"]
        if any(cells):
            lines.append([text, f"{epochs:.1f}", *cells])
    return grid(["accuracy of the last layer", "epochs", *(TASKS[task] for task in tasks)], lines)


def speed(name: str) -> list[str]:
    """What `offramp bench` measured, beside the network that was fine-tuned without exits."""
    found, beside = loaded("beem", f"speed-{name}.json"), loaded("beem", f"beside-{name}.json")
    if not found or not beside:
        return NOTHING
    cells: dict[str, dict[str, Any]] = {}
    for how, told in (("", found), (", one file", loaded("beem", f"speed-{name}-file.json"))):
        for cell in told["fields"]["cells"] if told else ():
            cells.setdefault(cell["policy"], {})[f"batch {cell['batch_size']}{how}"] = cell
    ways = sorted({way for each in cells.values() for way in each}, key=lambda way: ("file" in way, way))
    rows = []
    for each in beside["policies"]:
        mine = cells.get(each["policy"], {})
        live = [f"**{mine[way]['speedup']:.2f}x**" if way in mine else "" for way in ways]
        right = [percent(mine[way]["accuracy"]["value"]) for way in ways if way in mine]
        rows.append([each["policy"], f"{each['counted']:.2f}x", *live, " ".join(dict.fromkeys(right)),
                     points(each["less_plain"])])  # fmt: skip
    head = ["policy", "counted", *(f"measured, {way}" for way in ways), "accuracy, live", "less plain"]
    return [f"{found['fields']['machine']}; ONNX Runtime.", "", *grid(head, rows)]


def hours() -> list[list[str]]:
    """How long the trainings took, by task."""
    rows, tasks = [], dict[str, list[dict[str, Any]]]()
    for cell in (loaded("beem", "cells.json") or {}).values():
        tasks.setdefault(cell["task"], []).append(cell)
    for task, each in tasks.items():
        spent_h = sum(cell["seconds"] for cell in each) / 3600
        rows.append([TASKS[task], str(len(each)), f"{spent_h:.1f} h", each[0]["machine"]])
    return rows


def drawn(pictures: Path) -> list[Path]:
    """The pictures, written: accuracy over cost, a curve for each policy, points for the static networks."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.hashsalt": "offramp", "svg.fonttype": "none", "font.size": 8, "axes.linewidth": 0.6}
    paths = []
    for each in judged():
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        metric, families = each["metric"], {}
        for row in spent(each):
            families.setdefault(row["family"], []).append((100 * row["cost"], 100 * row[metric]))
        for i, (family, curve) in enumerate(families.items()):
            axes.plot(*zip(*sorted(curve), strict=True), ".-", lw=1, ms=4, color=f"C{i}", label=NAMES[family])
        axes.axhline(100 * each["plain"][metric], color="#444444", lw=0.8, ls="--", label="plain")
        for i, (name, static) in enumerate(each["static"].items()):
            axes.plot(100 * static["cost"], 100 * static[metric], "k^", ms=6, label=None if i else "fewer layers alone")
            axes.annotate(name.removeprefix("static-"), (100 * static["cost"], 100 * static[metric]),
                          xytext=(4, -9), textcoords="offset points")  # fmt: skip
        axes.set_xlabel("counted cost, % of the plain network (heads included)")
        axes.set_ylabel(f"{metric}, %")
        axes.set_title(f"{titled(each)}\nrows that neither training nor calibration saw", fontsize=9)
        figure.legend(fontsize=6, loc="outside right upper")  # beside the curves, not over them
        axes.grid(alpha=0.25)
        pictures.mkdir(parents=True, exist_ok=True)
        path = pictures / f"{each['task']}.svg"
        write_atomically(path, lambda to, f=figure: f.savefig(to, format="svg", metadata={"Date": None}))
        paths.append(path)
    return paths
