"""The tables and pictures of docs/results.md, from the JSON files under results/ and from nothing else.

    python -m experiments.render                # or: make results
    python -m experiments.render --check        # says what differs and writes nothing

What stands between `<!-- made: NAME -->` and `<!-- until here -->` is made anew; what is not measured yet is said so.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offramp.artefacts import write_atomically

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, PICTURES = ROOT / "results", ROOT / "docs" / "results.md", ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- made: ([\w-]+) -->\n).*?(<!-- until here -->)", flags=re.DOTALL)
NAMES = {
    "entropy": "entropy (DeeBERT, BranchyNet)", "patience": "patience (PABEE)", "f-pabee": "F-PABEE", "ztw": "ZTW",
    "jei-dnn": "JEI-DNN", "eenet": "EENet", "beem-c": "BEEM-C", "beem-a": "BEEM-A", "max-prob": "max-prob",
    "msdnet": "MSDNet's rule", "stopping": "stopping (ours)",
}  # fmt: skip
TASKS = {"sst2": "SST-2, 20,000 rows", "sst2-full": "SST-2", "rte": "RTE", "mrpc": "MRPC", "cola": "CoLA",
         "qnli": "QNLI", "ag_news": "AG News"}  # fmt: skip
NOTHING = ["Not measured yet."]
RECIPES = {
    "taught": "fine-tuned first, then taught by it (the base)", "taught-labels": "labels alone, no teacher",
    "taught-pure": "the teacher alone, no labels", "taught-self": "taught by the last exit instead",
    "taught-uniform": "every exit weighs the same", "taught-budget": "weights for budgets of 40 to 60 %",
    "taught-alternating": "last exit and all exits in turns (BERxiT)", "taught-equilibrium": "gradient equilibrium",
    "taught-detached": "exits' gradients stay in their heads", "taught-layer-decay": "earlier layers learn more slowly",
    "taught-attention": "attention heads", "taught-pooler": "a projection in every head",
    "taught-self-pooler": "taught by the last exit, a projection in every head", "taught-longer": "twice as long",
    "depth": "jointly from the start, depth weights (PABEE, BEEM)",
    "longer": "the same, for as long as the base in all",
    "plain-first": "fine-tuned, then taught by the last exit, in one run",
    "heads-after": "heads alone on the frozen network (DeeBERT)",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = rendered(before)
    if options.check:
        if before != after:
            raise SystemExit(f"{PAGE} is not what results/ gives: run python -m experiments.render")
        return
    write_atomically(PAGE, lambda path: path.write_text(after, encoding="utf-8"))
    for path in drawn():
        print(f"wrote {path}")
    print(f"wrote {PAGE}")


def rendered(page: str) -> str:
    """The page with every block made anew."""

    def made(match: re.Match[str]) -> str:
        name, _, what = match[2].partition("-")
        return f"{match[1]}\n{chr(10).join(BLOCKS[name](what))}\n\n{match[3]}"

    return BLOCK.sub(made, page)


def loaded(*path: str) -> dict[str, Any] | None:
    """A result, None when it is not there yet."""
    file = RESULTS.joinpath(*path)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def judged() -> list[dict[str, Any]]:
    """BEEM's table of every task and seed that is judged, with the budgets that they share."""
    table = loaded("beem", "table.json") or {"policies": [], "budgets": []}
    return [{**each, "budgets": table["budgets"]} for each in table["policies"]]


def grid(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(each)} |" for each in (head, ["---"] * len(head), *rows)]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def points(found: dict[str, float]) -> str:
    """A difference in points with its interval."""
    return f"{100 * found['value']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


def networks(_: str) -> list[str]:
    """What a user would pick instead: the plain network, and its first layers fine-tuned alone; beside the exits."""
    rows = []
    for each in judged():
        metric, plain = each["metric"], each["plain"]
        static = {name: each["static"].get(name) for name in ("static-2", "static-3", "static-4")}
        rows.append([
            TASKS[each["task"]], str(each["seed"]), metric, str(each["held_out"]),
            percent(plain[metric]) if plain else "", *(percent(s[metric]) if s else "" for s in static.values()),
            " ".join(percent(e[metric]) for e in each["exits"]),
        ])  # fmt: skip
    head = ["task", "seed", "metric", "rows", "plain", "2 layers", "3 layers", "4 layers", "exits 1 to 6"]
    return grid(head, rows) if rows else NOTHING


def beem(_: str) -> list[str]:
    """Every policy at accuracy at or above the last exit's on the calibration rows, judged on the others."""
    lines = []
    for each in judged():
        metric = each["metric"]
        lines += [f"**{TASKS[each['task']]}, seed {each['seed']}** ({metric}, {each['held_out']} rows; last exit "
                  f"{percent(each['last'][metric])}" + (f", plain {percent(each['plain'][metric])})"
                  if each["plain"] else ")"), ""]  # fmt: skip
        rows = [
            [NAMES[row["family"]], row["target"], percent(row[metric]), f"{1 / row['cost']:.2f}x",
             points(row["less_plain"]) if "less_plain" in row else ""]
            for row in each["rows"] if "of the plain" not in row["target"]
        ]  # fmt: skip
        lines += [*grid(["policy", "thresholds from", metric, "counted speed-up", "accuracy less plain"], rows), ""]
    return lines[:-1] or NOTHING


def budgets(_: str) -> list[str]:
    """Every policy at every budget."""
    lines = []
    for each in judged():
        metric = each["metric"]
        by: dict[str, list[str]] = {}
        for row in each["rows"]:
            if "of the plain" in row["target"]:
                by.setdefault(row["family"], []).append(f"{percent(row[metric])} at {row['cost']:.2f}")
        head = [f"{TASKS[each['task']]}, seed {each['seed']}", *(f"{100 * b:.0f} %" for b in each["budgets"])]
        if each["seed"] == 0:
            lines += [f"![Accuracy over counted cost, {TASKS[each['task']]}](results/{each['task']}.svg)", ""]
        lines += [*grid(head, [[NAMES[family], *cells] for family, cells in by.items()]), ""]
    return lines[:-1] or NOTHING


def recipes(_: str) -> list[str]:
    """The ablation: the mean over budgets and two policies, and the paired difference to the base recipe."""
    table = loaded("beem", "table.json")
    if not table or not any(table["recipes"].values()):
        return NOTHING
    found = {task: {row["variant"]: row for row in rows} for task, rows in table["recipes"].items() if rows}
    lines = []
    for variant, text in RECIPES.items():
        cells = []
        for rows in found.values():
            row = rows.get(variant)
            cells.append("" if row is None else percent(row["mean"]) if variant == "taught"
                         else f"{percent(row['mean'])}, {points(row['less_base'])}")  # fmt: skip
        if any(cells):
            lines.append([text, *cells])
    return grid(["recipe", *(TASKS[task] for task in found)], lines)


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


TEXTS = {"scenes": "scenes", "coco": "captions of COCO", "flickr8k": "photographs"}
KINDS = {"max-prob": "max-prob", "calm": "CALM (margin, thresholds that fall)", "patience": "patience (PABEE)",
         "beem-a": "BEEM-A", "stopping": "stopping (ours)", "fixed": "all tokens at one exit"}  # fmt: skip


def lost(row: dict[str, Any]) -> str:
    return f"{100 * row['drop']:+.1f} % ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"


def tokens(name: str) -> list[str]:
    """Policies for tokens on the same exits, at the same budgets."""
    found = loaded("tokens", f"{name}.json")
    if not found:
        return NOTHING
    coco = found["task"] == "coco"
    what = "perplexity" if coco else "CIDEr"
    right = " ".join(percent(each) for each in found["token_accuracy"])
    by: dict[str, list[str]] = {}
    for row in found["rows"]:
        cell = "none" if "why" in row else f"{row['worth']:.2f} at {row['cost']:.2f}, {lost(row)}"
        by.setdefault(row["family"], []).append(cell)
    budgets = list(dict.fromkeys(f"{100 * row['budget']:.0f} %" for row in found["rows"]))
    return [
        f"{found['texts']} {TEXTS[found['task']]}; the whole decoder's {what} is {found['whole']:.2f}. The exits say "
        f"the next token of calibration texts right at {right}. Each cell: {what} at the cost spent, and what was "
        f"{'added' if coco else 'lost'}.",
        "", *grid(["policy", *budgets], [[KINDS[family], *cells] for family, cells in by.items()]),
        *scored(found),
    ]  # fmt: skip


def scored(found: dict[str, Any]) -> list[str]:
    """All scores of the whole decoder, and of the policies at three fifths, where more than the usual were taken."""
    names = list(found["whole_scores"])
    if "BLEU-1" not in names:
        return []
    rows = [("whole decoder", found["whole_scores"])]
    rows += [(f"{KINDS[row['family']]}, 60 %", row["scores"]) for row in found["rows"]
             if row["budget"] == 0.6 and "scores" in row]  # fmt: skip
    table = [[who, *(f"{each[name]:.2f}" if name == "CIDEr" else percent(each[name]) for name in names)]
             for who, each in rows]  # fmt: skip
    return ["", *grid(["", *names], table)]


def heads(name: str) -> list[str]:
    """Kinds of vocabulary heads on the same decoder."""
    found = loaded("tokens", f"heads-{name}.json")
    if not found:
        return NOTHING
    rows = []
    for row in found["rows"]:
        for who, each in ((row["kind"], row), (f"{row['kind']}, with gates", row.get("gated"))):
            if each:
                rows.append([
                    who, f"{row['weights'] / 1e6:.2f} M", f"{sum(row['head_ms']) / len(row['head_ms']):.2f} ms",
                    percent(row["token_accuracy"][2]), f"{each['worth']:.2f}", lost(each), f"{each['cost']:.2f}",
                ])  # fmt: skip
    plain = found["rows"][0]["plain_ms"]
    head = ["heads", "weights", "an exit asked", "third exit right", "perplexity", "added", "counted cost"]
    return [f"{found['machine']}; a token of the whole decoder takes {plain:.2f} ms.", "", *grid(head, rows)]


def token_speed(name: str) -> list[str]:
    """Measured tokens a second of certified policies, shallower decoders, forced exits and checked drafts."""
    found = loaded("tokens", f"speed-{name}.json")
    if not found:
        return NOTHING
    rows, what = [], "perplexity" if found["task"] == "coco" else "CIDEr"
    whole = {"worth": found["whole"]}
    names = {"plain": "whole decoder", "transformers": "whole decoder, transformers' `generate`", **KINDS,
             **{who: f"{who.removeprefix('shallow-')} layers alone" for who in found["shallow"]},
             "shallow-1": "one layer alone", "alone": "trained without exits"}  # fmt: skip
    told = {"plain": whole, "transformers": whole, **{each["family"]: each for each in found["policies"]},
            **found["shallow"]}  # fmt: skip
    for who, each in told.items():
        cells = [found["batches"][size].get(who) for size in ("1", "8")]
        kept = [f"{cell['kept']:.2f}" if cell and "kept" in cell else "" for cell in cells]
        rows.append([
            names[who],
            f"{each['worth']:.2f}" if "worth" in each else "none certified",
            lost(each) if "drop" in each else "",
            *(f"{cell['tokens_per_s']:.0f}/s, **{cell['speedup']:.2f}x**" if cell else "" for cell in cells), *kept,
        ])  # fmt: skip
    head = ["", what, "lost", "batch 1", "batch 8", "kept of what stages allow, 1", "8"]
    forced = [[str(each["layer"]), f"{each['speedup']:.2f}x", f"{each['kept']:.2f}"] for each in found["forced"]]
    draft = found["lossless"]
    same = f"{draft['same']} of {draft['texts']} texts are the whole decoder's"
    pays = "" if draft["pays"] else ", so it does not pay"
    return [
        f"{found['machine']}.", "", *grid(head, rows), "",
        *grid(["every token leaves behind layer", "measured", "of the ideal, its head included"], forced), "",
        f"Lossless: drafts of exit {draft['draft'][0] + 1}, {draft['draft'][1]} tokens: {same}, "
        f"{draft['speedup']:.2f}x{pays}.",
    ]  # fmt: skip


def times(_: str) -> list[str]:
    """How long the trainings took, by task."""
    rows, tasks = [], dict[str, list[dict[str, Any]]]()
    for cell in (loaded("beem", "cells.json") or {}).values():
        tasks.setdefault(cell["task"], []).append(cell)
    for task, each in tasks.items():
        hours = sum(cell["seconds"] for cell in each) / 3600
        rows.append([TASKS[task], str(len(each)), f"{hours:.1f} h", each[0]["machine"]])
    for name in ("basic-0", "tuned-0"):
        cell = loaded("eenet", f"{name}.json")
        if cell:
            rows.append([f"CIFAR-10, {name}", "1", f"{cell['report']['seconds'] / 3600:.1f} h", cell["machine"]])
    return grid(["task", "trainings", "in all", "machine"], rows) if rows else NOTHING


BLOCKS: dict[str, Callable[[str], list[str]]] = {
    "networks": networks, "beem": beem, "budgets": budgets, "recipes": recipes, "eenet": eenet, "checks": checks,
    "speed": speed, "times": times, "tokens": tokens, "tokenspeed": token_speed, "heads": heads,
}  # fmt: skip


def drawn() -> list[Path]:
    """The pictures, written: accuracy over cost, a curve for each policy, points for the static networks."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.hashsalt": "offramp", "svg.fonttype": "none", "font.size": 8, "axes.linewidth": 0.6}
    paths = []
    for each in judged():
        if each["seed"] != 0:
            continue
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        metric, families = each["metric"], {}
        for row in each["rows"]:
            if "of the plain" in row["target"]:
                families.setdefault(row["family"], []).append((100 * row["cost"], 100 * row[metric]))
        for i, (family, curve) in enumerate(families.items()):
            axes.plot(*zip(*sorted(curve), strict=True), ".-", lw=1, ms=4, color=f"C{i}", label=NAMES[family])
        if each["plain"]:
            axes.axhline(100 * each["plain"][metric], color="#444444", lw=0.8, ls="--", label="plain")
        for i, (name, static) in enumerate(each["static"].items()):
            axes.plot(100 * static["cost"], 100 * static[metric], "k^", ms=6, label=None if i else "fewer layers alone")
            axes.annotate(name.removeprefix("static-"), (100 * static["cost"], 100 * static[metric]),
                          xytext=(4, -9), textcoords="offset points")  # fmt: skip
        axes.set_xlabel("counted cost, % of the plain network (heads included)")
        axes.set_ylabel(f"{metric}, %")
        axes.set_title(f"{TASKS[each['task']]}: rows that neither training nor calibration saw", fontsize=9)
        figure.legend(fontsize=6, loc="outside right upper")  # beside the curves, not over them
        axes.grid(alpha=0.25)
        PICTURES.mkdir(parents=True, exist_ok=True)
        path = PICTURES / f"{each['task']}.svg"
        write_atomically(path, lambda to, f=figure: f.savefig(to, format="svg", metadata={"Date": None}))
        paths.append(path)
    return paths


if __name__ == "__main__":
    main()
