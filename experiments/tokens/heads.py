"""Which heads pay: kinds of vocabulary heads on the same frozen decoder, by what they cost and what they keep.

    python -m experiments.tokens.heads --data DIR      # writes results/tokens/heads-coco.json

Heads alone learn for an epoch on the decoder that `train coco exits` left, half from labels, half from its last layer.
Then max-prob is calibrated to 60 % of the plain decoder's measured time for a token, heads and decisions included, and
judged on the test texts. With gates, an exit's vocabulary is looked at only where a gate says that it pays.
"""

from typing import Any

import torch
from experiments.tokens.networks import rows_of, tokenizer_of
from experiments.tokens.table import Judge, drop, spent, worth
from experiments.tokens.train import model_of, parser_of

from offramp import Budget, CostModel, MaxProb, Recipe, SelfDistill, calibrate, train
from offramp.artefacts import write_json
from offramp.generation import TokenExits, TokenPolicy, attach_tokens, learn_gates, measure_tokens, record_tokens
from offramp.machine import machine_line, versions
from offramp.tokenrows import TokenRows

SHARE, LISTED, GATE = 0.6, 500, 0.5
KINDS: dict[str, dict[str, Any]] = {
    "factorised, rank 16": {"head": "factorised", "rank": 16},
    "factorised, rank 32": {"head": "factorised", "rank": 32},
    "factorised, rank 64": {"head": "factorised", "rank": 64},
    f"shortlist of {LISTED}": {"head": "shortlist"},
    "full": {"head": "full"},
    "shared": {"head": "shared"},
}


def frequent(rows: TokenRows, count: int, vocabulary: int) -> torch.Tensor:
    """The tokens that are said most often."""
    return torch.bincount(rows.ids.values.long(), minlength=vocabulary).topk(count).indices


def judged(
    model: TokenExits, rule: TokenPolicy | None, costs: CostModel, judge: Judge, whole: dict[str, Any]
) -> dict[str, Any]:
    found, exits = judge(rule)
    return {"worth": worth("coco", found), **drop("coco", whole, found), "cost": spent(costs, exits, rule, model.exits)}


def main() -> None:
    options = parser_of(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    cache = options.runs / "cache"
    splits = {split: rows_of("coco", split, options.data, cache, limit=options.limit)
              for split in ("train", "calibrate", "test")}  # fmt: skip
    before = model_of("coco", "exits", 0, options.data, options.runs)
    tokenizer, table = tokenizer_of("coco", options.data, cache), []
    prompts = [splits["test"].rows.row(i)[:4] for i in range(8)]
    for name, kind in KINDS.items():
        listed = frequent(splits["train"].rows, LISTED, before.classes) if kind["head"] == "shortlist" else None
        model = attach_tokens(before.backbone, before.at, shortlist=listed, **kind)
        if kind["head"] != "shared":
            recipe = Recipe(epochs=1, batch_size=32, head_lr=1e-3, frozen="backbone")
            goal = SelfDistill(temperature=1.0, weights="uniform")
            train(model, splits["train"].rows, objective=goal, recipe=recipe)
        trace = record_tokens(model, splits["calibrate"].rows)
        torch.set_num_threads(1)
        costs = measure_tokens(model, prompts, rounds=40)
        torch.set_num_threads(options.threads)
        target = Budget(ms=1000 * SHARE * costs.plain_s(1))
        rule = TokenPolicy(calibrate(MaxProb, trace, costs, target).policy)
        judge = Judge("coco", model, splits["test"], tokenizer, options.limit)
        whole, _ = judge(None)
        row = {
            "kind": name, "weights": sum(p.numel() for p in model.heads.parameters()),
            "token_accuracy": trace.accuracy(), "head_ms": [1000 * each for each in costs.timed[0].head_s],
            "stage_ms": [1000 * each for each in costs.timed[0].stage_s], "plain_ms": 1000 * costs.plain_s(1),
            "enabled": rule.policy.enabled, **judged(model, rule, costs, judge, whole),
        }  # fmt: skip
        if name == "factorised, rank 64":
            row["gates_right"] = learn_gates(model, splits["train"].rows)
            row["gated"] = judged(model, TokenPolicy(rule.policy, gate=GATE), costs, judge, whole)
        table.append(row)
        print({key: row[key] for key in ("kind", "worth", "drop", "cost", "head_ms")}, flush=True)
    value = {"share": SHARE, "gate": GATE, "rows": table, "threads": 1, "machine": machine_line(),
             "versions": versions(), "limit": options.limit}  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"wrote {write_json(options.out / 'heads-coco.json', value)}")


if __name__ == "__main__":
    main()
