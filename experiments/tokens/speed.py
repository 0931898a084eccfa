"""How fast tokens are: certified policies, shallower decoders, drafts that are checked, and forced exits.

    python -m experiments.tokens.speed scenes exits --data DIR       # writes results/tokens/speed-scenes-exits.json

Everything takes turns with the whole decoder on the same texts, generated one after the other (batch 1) and eight at
once. What an encoder gives is computed before, alike for all. A policy is the boldest of its family, over budgets from
the calibration trace (or all tokens at one exit), that keeps a promise on the certify texts: scenes at most 1 % of
CIDEr lost with 95 % confidence (Learn then Test over whole captions); COCO's texts a perplexity that rises by at most
2 %, the upper end of a bootstrap interval over texts. What it loses is told for the test texts.
"""

import contextlib
import hashlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from experiments.tokens.networks import PICTURED, rows_of, tokenizer_of
from experiments.tokens.table import NEW, Judge, drop, rule_of, spent, worth
from experiments.tokens.theirs import written
from experiments.tokens.train import WITH_EXITS, folder_of, model_of, parser_of
from torch import Tensor

from offramp import CostModel, ExitTrace
from offramp.artefacts import write_json
from offramp.errors import ValueRangeError
from offramp.generation import (
    MetricDrop,
    TokenExits,
    TokenPolicy,
    certify_texts,
    choose_draft,
    generate,
    generate_lossless,
    measure_tokens,
    record_tokens,
)
from offramp.generation.loop import Run
from offramp.machine import alternate, machine_line, versions
from offramp.policies import Fixed, from_dict, to_dict

#: budgets of policies, from the first exit's cost (0) to the plain decoder's (1)
RUNGS = (0.98, 0.85, 0.7, 0.6, 0.5, 0.42, 0.35, 0.3, 0.25, 0.2, 0.16, 0.13, 0.1, 0.08, 0.06, 0.045, 0.03, 0.02, 0.01)
CERTIFIED = ("max-prob", "beem-a", "stopping", "fixed")
SHARE, RISE, DELTA = 0.01, 0.02, 0.05
BESIDE = ("plain", "shallow-1", "shallow-2", "shallow-3", "shallow-4", "shallow-6")  # trained without exits
GIVEN = 4  # tokens of a COCO caption that are given, the first included


class Setting:
    """A model with what its texts are generated from."""

    def __init__(self, task: str, model: TokenExits, data: Path, cache: Path, limit: int | None) -> None:
        self.task, self.model = task, model
        self.tokenizer = tokenizer_of(task, data, cache)
        self.splits = {split: rows_of(task, split, data, cache, limit=limit) for split in ("certify", "test")}
        self.judges = {split: Judge(task, model, rows, self.tokenizer, limit) for split, rows in self.splits.items()}

    def prompts(self, split: str, count: int) -> tuple[list[list[int]], Any]:
        """(what is given, what the encoder gave or None)."""
        rows = self.splits[split].rows
        count = min(count, self.judges[split].count)
        if self.task in PICTURED:
            encoded = self.judges[split].encoded
            return [[0]] * count, None if encoded is None else encoded[:count]
        return [rows.row(i)[: min(GIVEN, len(rows.row(i)) - 1)] for i in range(count)], None

    def writer(self, rule: TokenPolicy | None, split: str, count: int, size: int) -> Callable[[], Any]:
        """Generates the first texts of a split, so many at once."""
        given, encoded = self.prompts(split, count)

        def write() -> list[Any]:
            return [
                generate(
                    self.model, rule, given[i : i + size], max_new_tokens=24 if self.task == "coco" else NEW,
                    end=1, encoded=None if encoded is None else encoded[i : i + size],
                )
                for i in range(0, len(given) - size + 1, size)
            ]  # fmt: skip

        return write

    def transformers(self, split: str, count: int) -> Callable[[], Any]:
        """The first texts of a split one after the other, by transformers' own generation with its own cache."""
        given, _ = self.prompts(split, count)
        states, new = self.splits[split].rows.encoded, 24 if self.task == "coco" else NEW

        def write() -> list[Any]:
            found = []
            for i, row in enumerate(given):
                seen = None if states is None else states[i : i + 1]
                found.append(Written(written(self.model.backbone, [row], new, end=1, states=seen)))
            return found

        return write


@dataclass(frozen=True)
class Written:
    """Tokens of transformers, without those given."""

    tokens: list[list[int]]


def certified(setting: Setting, family: str, trace: ExitTrace, costs: CostModel) -> dict[str, Any]:
    """The boldest policy of a family that keeps the promise, and what was tried."""
    rungs, least = list[TokenPolicy](), costs.stage[0] + costs.head[0]
    if family == "fixed":
        rungs = [TokenPolicy(Fixed(k, trace.exits)) for k in reversed(range(trace.exits - 1))]
    for rung in () if rungs else RUNGS:
        with contextlib.suppress(ValueRangeError):  # it cannot spend so little
            rule = rule_of(family, trace, costs, least + rung * (1 - least), thin=True)
            rungs += [rule] if rule not in rungs else []
    if setting.task in PICTURED:
        given, encoded = setting.prompts("certify", 10**6)
        loss = MetricDrop(
            setting.splits["certify"].references[: len(given)],
            lambda tokens: setting.tokenizer.decode(tokens, skip_special_tokens=True), share=SHARE,
        )  # fmt: skip
        found = certify_texts(
            setting.model, rungs, given, loss, delta=DELTA, max_new_tokens=NEW, end=1, encoded=encoded, batch_size=32
        )
        tried = [{"loss": each.loss, "p": each.p, "depth": each.depth} for each in found.tried]
        return {"rule": found.policy, "tried": tried}
    whole, _ = setting.judges["certify"](None)
    best, tried = None, list[dict[str, Any]]()
    for rule in rungs:
        early, _ = setting.judges["certify"](rule)
        lost = drop("coco", whole, early)
        tried.append(lost)
        if lost["high"] > RISE:
            break
        best = rule
    return {"rule": best, "tried": tried}


def kept_promises(
    setting: Setting, trace: ExitTrace, costs: CostModel, whole: dict[str, Tensor], folder: Path
) -> list[dict[str, Any]]:
    """For each family the policy that keeps the promise, and what it loses on the test texts. They are kept beside the
    weights, because they take longer than all that is timed."""
    path = folder / "certified.json"
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    told = {"share": SHARE, "rise": RISE, "delta": DELTA, "rungs": list(RUNGS),
            "texts": setting.judges["certify"].count, "weights": weights}  # fmt: skip
    found = list[dict[str, Any]]()
    if path.exists() and (before := json.loads(path.read_text(encoding="utf-8")))["told"] == told:
        found = before["rows"]
    for family in CERTIFIED:
        if any(row["family"] == family for row in found):
            continue
        one = certified(setting, family, trace, costs)
        rule = one.pop("rule")
        row = {"family": family, **one, "policy": None if rule is None else to_dict(rule.policy)}
        if rule is not None:
            early, exits = setting.judges["test"](rule)
            row |= {"worth": worth(setting.task, early), **drop(setting.task, whole, early),
                    "cost": spent(costs, exits, rule, setting.model.exits)}  # fmt: skip
        print({name: value for name, value in row.items() if name not in ("tried", "policy")}, flush=True)
        found.append(row)
        write_json(path, {"told": told, "rows": found})
    return found


def timed(writers: dict[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, float]]:
    """Tokens a second by name, medians of alternating rounds; and the speed-up over the first."""
    tokens = {name: sum(len(row) for said in write() for row in said.tokens) for name, write in writers.items()}
    found = alternate(dict(writers), rounds=40, seconds=seconds)
    names = list(writers)
    per = {name: tokens[name] / each.median_s for name, each in found.items()}
    return {
        name: {"tokens_per_s": per[name], "speedup": per[name] / per[names[0]], "spread": found[name].spread_s
               / found[name].median_s, "rounds": float(found[name].rounds)}
        for name in names
    }  # fmt: skip


def reading(setting: Setting, count: int, size: int, rounds: int = 5) -> float:
    """Seconds that the whole decoder reads the prompts of the first texts for, so many at once, but their last tokens;
    0 where a prompt is one token. Layers that no new token comes to do not read it."""
    given, encoded = setting.prompts("test", count)
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        with torch.inference_mode():
            for i in range(0, len(given) - size + 1, size):
                before = [row[:-1] for row in given[i : i + size]]
                if any(before):
                    seen = None if encoded is None else encoded[i : i + size]
                    Run(setting.model, None, [len(row) for row in before], NEW, seen).read(before)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) if len(given[0]) > 1 else 0.0


def looking(setting: Setting, size: int, rounds: int = 7) -> list[float]:
    """Seconds in which a layer makes its keys and values of what the encoder gave, by rows; 0 without an encoder."""
    encoded, decoder = setting.prompts("test", size)[1], setting.model.decoder
    if encoded is None:
        return [0.0] * (size + 1)
    taken: list[list[float]] = [[0.0], *([] for _ in range(size))]
    with torch.inference_mode():
        for rows in list(range(1, size + 1)) * rounds:
            memory = decoder.memory(encoded[:rows])
            began = time.perf_counter()
            for j in range(decoder.layers):
                memory[j]
            taken[rows].append((time.perf_counter() - began) / decoder.layers)
    return [statistics.median(each) for each in taken]


def promised_by_stages(setting: Setting, rule: TokenPolicy, costs: CostModel, size: int, count: int) -> float:
    """The speed-up that the measured stages allow, at the sizes that reach each of them at each step, with what a layer
    makes of an image for the rows that first come to it."""
    plain = read = reading(setting, count, size)
    early, written = 0.0, setting.writer(rule, "test", count, size)()
    ends, look = (*setting.model.at, setting.model.decoder.layers - 1), looking(setting, size)
    layers = [end - begin for begin, end in zip((-1, *ends), ends, strict=False)]  # of each stage
    for said in written:
        early += read / len(written) * _depth(setting.model, max(map(max, said.exits)))
        plain += look[len(said.exits)] * sum(layers)
        for k, many in enumerate(layers):
            first = [next((t for t, at in enumerate(row) if at >= k), None) for row in said.exits]
            early += many * sum(look[rows] for t, rows in Counter(first).items() if t is not None)
        for t in range(max(map(len, said.exits))):
            left = [0] * setting.model.exits
            for row in said.exits:
                if t < len(row):
                    left[row[t]] += 1
            if t or not read:  # the whole decoder's first token comes of reading
                plain += costs.plain_s(sum(left))
            early += costs.stages_s(left)
    return plain / early


def _depth(model: TokenExits, k: int) -> float:
    """The share of the layers before exit k."""
    return (model.at[k] + 1) / model.decoder.layers if k < len(model.at) else 1.0


def forced(setting: Setting, seconds: float, count: int) -> list[dict[str, float]]:
    """Every token at one exit, against that share of the layers, for the prompt too, and its head, all measured."""
    model, exits = setting.model, setting.model.exits
    hidden = torch.randn(1, model.decoder.width)
    with torch.inference_mode():
        heads = alternate({str(k): lambda k=k: model.said(k, hidden).argmax(-1).item() for k in range(exits)},
                          rounds=400, seconds=2)  # fmt: skip
    writers = {"plain": setting.writer(None, "test", count, 1)}
    writers |= {str(k): setting.writer(TokenPolicy(Fixed(k, exits)), "test", count, 1) for k in range(exits - 1)}
    speeds = timed(writers, seconds)
    tokens = sum(len(row) for said in writers["plain"]() for row in said.tokens)
    read_s, last = reading(setting, count, 1) / tokens, heads[str(exits - 1)].median_s
    texts = len(setting.prompts("test", count)[0]) if read_s else 0  # whose first tokens the reading gave
    plain_s = (1 / speeds["plain"]["tokens_per_s"] - read_s) * tokens / (tokens - texts)
    found = []
    for k in range(exits - 1):
        ideal = (read_s + plain_s - last) * _depth(model, k) + heads[str(k)].median_s
        found.append({"exit": k, "layer": model.at[k] + 1, **speeds[str(k)],
                      "kept": ideal * speeds[str(k)]["tokens_per_s"]})  # fmt: skip
    return found


def lossless(setting: Setting, seconds: float) -> dict[str, Any]:
    """The draft that is fastest here, whether its texts are the whole decoder's, and its speed."""
    few, few_encoded = setting.prompts("certify", 24)
    most = 24 if setting.task == "coco" else NEW
    times = choose_draft(setting.model, few, max_new_tokens=most, end=1, encoded=few_encoded)
    draft = times.drafts[0][0]
    given, encoded = setting.prompts("test", 10**6)
    whole = setting.writer(None, "test", 10**6, 1)()
    checked = generate_lossless(setting.model, draft, given, max_new_tokens=most, end=1, encoded=encoded)
    same = sum(said.tokens[0] == row for said, row in zip(whole, checked.tokens, strict=True))

    def write() -> list[Any]:
        return [generate_lossless(setting.model, draft, few, max_new_tokens=most, end=1, encoded=few_encoded)]

    speeds = timed({"plain": setting.writer(None, "certify", 24, 1), "drafts": write}, seconds)
    return {"draft": [draft.exit, draft.tokens, draft.sure], "texts": len(given), "same": same,
            "drafted": checked.drafted, "kept": checked.kept, "pays": speeds["drafts"]["speedup"] > 1,
            **speeds["drafts"]}  # fmt: skip


def speeds(
    task: str, variant: str, data: Path, runs: Path, *, seed: int, limit: int | None, seconds: float, count: int
) -> dict[str, Any]:
    """All figures of a decoder."""
    cache, model = runs / "cache", model_of(task, variant, seed, data, runs)
    trace = record_tokens(model, rows_of(task, "calibrate", data, cache, limit=limit).rows)
    setting = Setting(task, model, data, cache, limit)
    given, encoded = setting.prompts("test", 8)
    costs = measure_tokens(model, given, batch_sizes=(), encoded=encoded)
    whole, _ = setting.judges["test"](None)
    found = kept_promises(setting, trace, costs, whole, folder_of(task, variant, seed, runs))
    rules = {row["family"]: TokenPolicy(from_dict(row["policy"])) for row in found if row["policy"] is not None}
    shallow = dict[str, dict[str, Any]]()
    for name in BESIDE:
        if (folder_of(task, name, seed, runs) / "cell.json").exists():
            other = Setting(task, model_of(task, name, seed, data, runs), data, cache, limit)
            early, _ = other.judges["test"](None)
            shallow[name.replace("plain", "alone")] = {
                "setting": other,
                "worth": worth(task, early),
                **drop(task, whole, early),
            }
    print("timing, for which the machine should be idle ...", flush=True)
    costs, batches = measure_tokens(model, given, batch_sizes=(1, 2, 3, 4, 6, 8), rounds=40, encoded=encoded), {}
    for size in (1, 8):
        writers = {"plain": setting.writer(None, "test", count * size, size)}
        if size == 1:
            writers["transformers"] = setting.transformers("test", count)
        writers |= {name: setting.writer(rule, "test", count * size, size) for name, rule in rules.items()}
        writers |= {
            name: each["setting"].writer(None, "test", count * size, size)
            for name, each in shallow.items()
            if name != "alone"
        }  # it is the whole decoder with other weights
        batches[str(size)] = timed(writers, seconds)
        for name, rule in rules.items():
            allowed = promised_by_stages(setting, rule, costs, size, count * size)
            batches[str(size)][name] |= {"allowed": allowed, "kept": batches[str(size)][name]["speedup"] / allowed}
        print(size, batches[str(size)], flush=True)
    for each in shallow.values():
        del each["setting"]
    return {
        "task": task, "variant": variant, "seed": seed, "whole": worth(task, whole), "policies": found,
        "shallow": shallow, "batches": batches, "forced": forced(setting, seconds, count),
        "lossless": lossless(setting, seconds), "share": SHARE, "rise": RISE, "delta": DELTA,
        "certify": setting.judges["certify"].count, "test": setting.judges["test"].count,
        "threads": torch.get_num_threads(), "machine": machine_line(), "versions": versions(), "limit": limit,
    }  # fmt: skip


def main() -> None:
    parser = parser_of(__doc__, variants=WITH_EXITS, threads=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="about so long for each group of contenders")
    parser.add_argument("--count", type=int, default=16, help="batches that a contender generates in a turn")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = speeds(
        options.task, options.variant, options.data, options.runs, seed=options.seed, limit=options.limit,
        seconds=options.seconds, count=options.count,
    )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"wrote {write_json(options.out / f'speed-{options.task}-{options.variant}.json', found)}")


if __name__ == "__main__":
    main()
