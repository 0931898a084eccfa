"""What a token takes by its exit and by that of the token before it, beside what the measured stages promise.

    python -m experiments.tokens.behind coco joint-exits --data DIR  # results/tokens/behind-coco-joint-exits.json

For the certified policy of a family, batch 1, on the first test texts; a text's first token, which reads the prompt, is
not counted. The machine should be idle.
"""

import statistics
import time
from collections import defaultdict

import torch
from experiments.tokens.networks import PICTURED
from experiments.tokens.speed import CERTIFIED, Setting
from experiments.tokens.table import NEW
from experiments.tokens.train import WITH_EXITS, model_of, parser_of

from offramp.artefacts import read_json, write_json
from offramp.generation import TokenPolicy, measure_tokens
from offramp.generation.loop import Run
from offramp.machine import machine_line, versions
from offramp.policies import from_dict


def by_exits(setting: Setting, rule: TokenPolicy, texts: int, rounds: int) -> dict[tuple[int, int], list[float]]:
    """Seconds of tokens by (exit of the one before, own exit), the first round left out."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    given, encoded = setting.prompts("test", texts)
    new = NEW if setting.task in PICTURED else 24
    for turn in range(rounds + 1):
        for i, row in enumerate(given):
            with torch.inference_mode():
                run = Run(setting.model, rule, [len(row)], new, None if encoded is None else encoded[i : i + 1])
                logits, (before,) = run.begin([row])
                token = int(logits.argmax())
                for _ in range(new - 1):
                    if token == 1:
                        break
                    began = time.perf_counter()
                    logits, (exit_,) = run.step([0], [token])
                    token = int(logits.argmax())
                    if turn:
                        found[before, exit_].append(time.perf_counter() - began)
                    before = exit_
    return found


def main() -> None:
    parser = parser_of(__doc__, variants=WITH_EXITS, threads=1)
    parser.add_argument("--policy", choices=CERTIFIED, default="stopping")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    task, variant = options.task, options.variant
    torch.set_num_threads(options.threads)
    model = model_of(task, variant, options.seed, options.data, options.runs)
    setting = Setting(task, model, options.data, options.runs / "cache", options.limit)
    told = read_json(options.out / f"speed-{task}-{variant}.json")["policies"]
    (policy,) = (each["policy"] for each in told if each["family"] == options.policy)
    if policy is None:
        raise SystemExit(f"no {options.policy} policy kept its promise on {task}; choose another of {CERTIFIED}")
    given, encoded = setting.prompts("test", 8)
    costs = measure_tokens(model, given, batch_sizes=(1,), rounds=40, encoded=encoded)
    found = by_exits(setting, TokenPolicy(from_dict(policy)), options.texts, options.rounds)
    rows = [{"before": before, "exit": exit_, "tokens": len(seconds), "ms": 1000 * statistics.median(seconds)}
            for (before, exit_), seconds in sorted(found.items())]  # fmt: skip
    alone = [[int(i == k) for i in range(model.exits)] for k in range(model.exits)]
    value = {"task": task, "variant": variant, "seed": options.seed, "policy": options.policy, "rows": rows,
             "promised_ms": [1000 * costs.stages_s(each) for each in alone], "threads": options.threads,
             "machine": machine_line(), "versions": versions(), "limit": options.limit}  # fmt: skip
    for row in rows:
        print(row)
    print(f"wrote {write_json(options.out / f'behind-{task}-{variant}.json', value)}")


if __name__ == "__main__":
    main()
