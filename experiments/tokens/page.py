"""Tables of token-level exits, for docs/results.md."""

from statistics import mean
from typing import Any

from experiments.page import NOTHING, grid, loaded, percent

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
                    who, f"{row['weights'] / 1e6:.2f} M", f"{mean(row['head_ms'][:-1]):.2f} ms",
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


AGAINST = {"transformers": "transformers' `generate`", "beams": "transformers' beams",
           "deferred": "no cache, filled in later", "at once": "no cache, filled in at once"}  # fmt: skip


def parity(_: str) -> list[str]:
    """Tokens that were compared with transformers and with the reference without a cache, and those that differ."""
    found = loaded("tokens", "parity.json")
    if not found:
        return NOTHING
    rows = []
    for decoder in found["decoders"]:
        for batch in sorted({row["batch"] for row in decoder["rows"]}):
            cells = []
            for against in AGAINST:
                part = [row for row in decoder["rows"] if (row["against"], row["batch"]) == (against, batch)]
                compared, differ = (sum(row[each] for row in part) for each in ("tokens", "differ"))
                cells.append(f"{compared}: {f'**{differ}**' if differ else 'none'}")
            rows.append([decoder["name"], str(batch), *cells])
    return [f"{found['machine']}.", "", *grid(["decoder", "batch", *AGAINST.values()], rows)]


HIGHLIGHTS = {
    "scenes-joint-exits": ("captions of scenes", "% of CIDEr", ("beem-a", "stopping", "max-prob"), ("shallow-2",)),
    "coco-joint-exits": ("COCO's texts", "% of perplexity", ("fixed", "max-prob"), ("shallow-2",)),
}
LAYERS = {"shallow-2": "two layers trained alone"}


def highlights(_: str) -> list[str]:
    """What the README tells: certified policies, smaller decoders beside, and drafts, at batch 1 and 8."""
    rows = []
    for name, (task, unit, families, beside) in HIGHLIGHTS.items():
        found = loaded("tokens", f"speed-{name}.json")
        if not found:
            continue
        by = {each["family"]: each for each in found["policies"]} | found["shallow"]
        for who in (*families, *beside):
            lost = " to ".join(f"{100 * by[who][end]:.1f}" for end in ("low", "high"))
            speeds = [found["batches"][size][who]["speedup"] for size in ("1", "8")]
            rows.append([
                f"{task}, {LAYERS.get(who) or KINDS[who]}", f"{100 * by[who]['drop']:.1f} {unit} ({lost})",
                f"{speeds[0]:.2f}x ({speeds[1]:.2f}x)",
            ])  # fmt: skip
        draft = found["lossless"]
        same = f"nothing: {draft['same']} of {draft['texts']} texts the same"
        rows.append([f"{task}, checked drafts", same, f"{draft['speedup']:.2f}x"])
    return grid(["task, policy", "lost, 95 % interval", "speed-up"], rows) if rows else NOTHING
