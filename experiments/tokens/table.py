"""Policies on the same exits of a decoder, at the same budgets, judged on texts that nothing was chosen on.

    python -m experiments.tokens.table scenes exits --data DIR      # minutes; writes results/tokens/scenes-exits.json

Thresholds come from a trace of the calibration texts; every policy then generates captions of the test scenes (or
scores COCO's test texts) under the keys and values that its own exits leave behind. Differences to the whole decoder
are paired over texts.
"""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from experiments.tokens.networks import PICTURED, Rows, rows_of, tokenizer_of
from experiments.tokens.train import WITH_EXITS, model_of, parser_of
from torch import Tensor

from offramp import BEEM, Budget, CostModel, ExitTrace, Margin, MaxProb, Patience, Stopping
from offramp.artefacts import write_json
from offramp.calibrate import Options, calibrate_with
from offramp.calibrate.stopping import StoppingFit
from offramp.errors import OfframpError, ValueRangeError
from offramp.generation import TokenExits, TokenPolicy, caption_scores, measure_tokens, record_tokens, score
from offramp.generation.promises import in_batches
from offramp.machine import machine_line, versions
from offramp.policies import to_dict

BUDGETS = (0.35, 0.4, 0.5, 0.6, 0.7, 0.8)
JOINT_BUDGETS = {"scenes": (0.22, 0.23, 0.25, 0.3, 0.4, 0.5)}  # there the first exit is behind the first layer
FAMILIES = ("max-prob", "calm", "patience", "beem-a", "stopping")
METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
DECAY = 4.0  # CALM's tau
NEW, BATCH, DRAWS = 48, 32, 2000


def rule_of(family: str, trace: ExitTrace, costs: CostModel, budget: float, *, thin: bool = False) -> TokenPolicy:
    """The policy of a family that spends a share of the plain decoder on a trace; thin: at fewer exits where it may
    (optimal stopping at all of them). What optimal stopping is made of is chosen at that very budget.

    Raises:
        ValueRangeError: when the family cannot spend so little.
    """
    kinds: dict[str, Any] = {"max-prob": MaxProb, "patience": Patience, "beem-a": BEEM, "calm": Margin,
                             "stopping": Stopping}  # fmt: skip
    least = costs.stage[0] + costs.head[0]
    at = min(1.0, max(0.0, (budget - least) / (1 - least)))
    options = Options(stopping=StoppingFit(budgets=(at,)))
    thin &= family != "stopping"
    made = calibrate_with(kinds[family], trace, costs, Budget(fraction=budget), options, thin=thin)
    if made.status == "infeasible":
        raise ValueRangeError(made.message)
    if family == "calm":  # the margin, whose thresholds fall
        found: Any = made.policy
        more = 0.1 * sum(math.exp(-DECAY * int(name.partition(".")[2]) / NEW) for name in trace.ids or ()) / trace.rows
        raised = tuple(min(1.0, max(0.0, (x - more) / 0.9)) for x in found.thresholds)  # about as high in the mean
        return TokenPolicy(replace(found, thresholds=raised), decay=DECAY)
    return TokenPolicy(made.policy)


def spent(costs: CostModel, exits: Sequence[Sequence[int]], rule: TokenPolicy | None, count: int) -> float:
    """What a token cost, as a share of the plain decoder's."""
    visited = rule.visited(count) if rule is not None else (count - 1,)
    total = []
    for row in exits:
        for k in row:
            asked = [v for v in visited if v <= k and v < count - 1]
            total.append(sum(costs.stage[: k + 1]) + sum(costs.head[v] for v in asked))
    return sum(total) / max(1, len(total))


class Judge:
    """What texts are worth: CIDEr and others for scenes, the negative log-likelihood for COCO."""

    def __init__(self, task: str, model: TokenExits, rows: Rows, tokenizer: Any, limit: int | None) -> None:
        self.task, self.model, self.rows, self.tokenizer = task, model, rows, tokenizer
        self.count = len(rows.references) if limit is None else min(limit, len(rows.references))
        self.scores = dict[str, float]()  # of all texts together, as the field reports them
        self.encoded = None
        if task in PICTURED:
            with torch.inference_mode():
                self.encoded = model.narrowed(rows.rows.encoded[: self.count])  # type: ignore[index]

    def __call__(self, rule: TokenPolicy | None) -> tuple[dict[str, Tensor], list[tuple[int, ...]]]:
        """(a number for every text by measure, the exits)."""
        if self.task == "coco":
            given = [self.rows.rows.row(i) for i in range(self.count)]
            losses, exits = [], []
            for begin in range(0, self.count, BATCH):
                found = score(self.model, rule, given[begin : begin + BATCH])
                losses += found.losses
                exits += found.exits
            return {
                "loss": torch.tensor([sum(x) for x in losses]),
                "tokens": torch.tensor([len(x) for x in losses]),
            }, exits
        said = in_batches(
            self.model, policy=rule, prompts=[[0]] * self.count, max_new_tokens=NEW, end=1, encoded=self.encoded,
            batch_size=BATCH,
        )  # fmt: skip
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in said.tokens]
        names = METRICS if self.task == "flickr8k" else ("CIDEr", "ROUGE-L", "BLEU-4")
        names = tuple(name for name in names if name != "METEOR" or shutil.which("java"))
        scores = caption_scores(self.rows.references[: self.count], texts, metrics=names)
        self.scores = scores.whole
        return {"CIDEr": scores.rows["CIDEr"]}, list(said.exits)


def worth(task: str, found: dict[str, Tensor]) -> float:
    """Of all texts: CIDEr, or the perplexity."""
    if task == "coco":
        return math.exp(float(found["loss"].sum() / found["tokens"].sum()))
    return float(found["CIDEr"].double().mean())


def drop(task: str, whole: dict[str, Tensor], early: dict[str, Tensor]) -> dict[str, float]:
    """The share of CIDEr that is lost, or by which the perplexity rises, with a 95 % interval over texts."""
    generator = torch.Generator().manual_seed(0)
    rows = len(next(iter(whole.values())))
    picked = torch.randint(rows, (DRAWS, rows), generator=generator)
    if task == "coco":
        rise = ((early["loss"] - whole["loss"])[picked].sum(1) / whole["tokens"][picked].sum(1)).double().expm1()
        value = math.expm1(float((early["loss"] - whole["loss"]).sum() / whole["tokens"].sum()))
    else:
        rise = 1 - early["CIDEr"][picked].double().mean(1) / whole["CIDEr"][picked].double().mean(1)
        value = 1 - worth(task, early) / worth(task, whole)
    low, high = torch.quantile(rise.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"drop": value, "low": low, "high": high}


def table(
    task: str, variant: str, data: Path, runs: Path, *, seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Every family at every budget."""
    model, cache = model_of(task, variant, seed, data, runs), runs / "cache"
    tokenizer = tokenizer_of(task, data, cache)
    trace = record_tokens(model, rows_of(task, "calibrate", data, cache, limit=limit).rows)
    costs = measure_tokens(model, [[0, 3, 3, 3]], batch_sizes=())
    judge = Judge(task, model, rows_of(task, "test", data, cache, limit=limit), tokenizer, limit)
    whole, _ = judge(None)
    scores, rows = judge.scores, list[dict[str, Any]]()
    budgets = JOINT_BUDGETS.get(task, BUDGETS) if variant.startswith("joint") else BUDGETS
    for family in FAMILIES:
        for budget in budgets:
            began = time.perf_counter()
            try:
                rule = rule_of(family, trace, costs, budget)
            except OfframpError as error:
                rows.append({"family": family, "budget": budget, "why": str(error)})
                continue
            found, exits = judge(rule)
            left = torch.bincount(torch.tensor([k for row in exits for k in row]), minlength=model.exits)
            rows.append({
                "family": family, "budget": budget, "cost": spent(costs, exits, rule, model.exits),
                "worth": worth(task, found), **drop(task, whole, found), "left": (left / left.sum()).tolist(),
                "scores": judge.scores, "policy": to_dict(rule.policy), "decay": rule.decay,
            })  # fmt: skip
            last = rows[-1]
            lost = f"{last['drop']:+.2%} ({last['low']:+.2%} to {last['high']:+.2%})"
            took = time.perf_counter() - began
            print(f"{family} {budget:.0%}: cost {last['cost']:.3f}, {last['worth']:.3f}, lost {lost}, {took:.0f} s")
    return {
        "task": task, "variant": variant, "seed": seed, "texts": judge.count, "whole": worth(task, whole),
        "whole_scores": scores,
        "token_accuracy": trace.accuracy(), "tokens": trace.rows, "stage": costs.stage, "head": costs.head,
        "rows": rows, "machine": machine_line(), "versions": versions(), "limit": limit,
    }  # fmt: skip


def main() -> None:
    options = parser_of(__doc__, variants=WITH_EXITS).parse_args()
    torch.set_num_threads(options.threads)
    found = table(options.task, options.variant, options.data, options.runs, seed=options.seed, limit=options.limit)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"wrote {write_json(options.out / f'{options.task}-{options.variant}.json', found)}")


if __name__ == "__main__":
    main()
