"""Tokens compared with transformers' own generation, and tokens and exits with a reference that has no cache.

    python -m experiments.tokens.parity --data DIR       # writes results/tokens/parity.json

Kinds of decoders have random weights, so large that probabilities are far from even, prompts of unlike lengths, and
policies under which tokens leave at all depths; trained decoders have their test texts and the policies certified for
them (results/tokens/speed-TASK-VARIANT.json), and are left out where they are not trained. Both sides are counted token
by token, so everything behind a first difference differs too.
"""

import random
from dataclasses import dataclass
from typing import Any

import torch
from experiments.tokens.networks import PICTURED
from experiments.tokens.speed import Setting
from experiments.tokens.table import NEW
from experiments.tokens.theirs import written
from experiments.tokens.train import folder_of, model_of, parser_of
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from offramp.artefacts import read_json, write_json
from offramp.generation import TokenExits, TokenPolicy, attach_tokens, generate, generate_without_cache, search
from offramp.machine import machine_line, versions
from offramp.policies import BEEM, Entropy, MaxProb, Patience, from_dict

BATCHES = (1, 4, 16)
BEAMS = 3
LAYERS, WORDS = 6, 97
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 64, "vocab_size": WORDS, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"tie_word_embeddings": False}, "llama": GROUPED, "mistral": GROUPED, "qwen2": GROUPED,
    "qwen3": {"head_dim": 16, **GROUPED},
}  # fmt: skip
RULES = {
    "max-prob": TokenPolicy(MaxProb((0.5,) * LAYERS)),
    "calm": TokenPolicy(MaxProb((0.7,) * LAYERS), decay=4.0),
    "entropy": TokenPolicy(Entropy((0.5,) * LAYERS)),
    "patience": TokenPolicy(Patience(1)),
    "beem": TokenPolicy(BEEM(weights=(0.6,) * LAYERS, thresholds=(0.4,) * LAYERS)),
}
TRAINED = (("scenes", "joint-exits"), ("flickr8k", "exits"), ("coco", "joint-exits"))


@dataclass(frozen=True)
class Case:
    """A decoder with exits, policies, and the texts to go on from."""

    name: str
    model: TokenExits
    rules: dict[str, TokenPolicy]
    given: list[list[int]]
    new: int
    end: int | None = None
    encoded: Tensor | None = None  # as the decoder takes it
    states: Tensor | None = None  # as the encoder gave it

    def part(self, begin: int, size: int) -> tuple[list[list[int]], dict[str, Any]]:
        rows = slice(begin, begin + size)
        seen = None if self.encoded is None else self.encoded[rows]
        return self.given[rows], {"max_new_tokens": self.new, "end": self.end, "encoded": seen}

    def theirs(self, begin: int, size: int, **more: Any) -> list[list[int]]:
        rows = slice(begin, begin + size)
        states = None if self.states is None else self.states[rows]
        return written(self.model.backbone, self.given[rows], self.new, end=self.end, states=states, **more)


def of_kind(kind: str, texts: int) -> Case:
    """A small decoder of a kind."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **KINDS[kind])).eval()
    for parameter in network.parameters():
        parameter.data *= 1.0 if parameter.ndim < 2 else 6.0
    network.lm_head.weight.data *= 4.0
    dice = random.Random(1)
    given = [[dice.randrange(WORDS) for _ in range(dice.randint(1, 9))] for _ in range(texts)]
    return Case(f"{kind}, random weights", attach_tokens(network, head="shared"), RULES, given, 24)


def of_task(task: str, variant: str, texts: int, options: Any) -> Case:
    """A trained decoder with its test texts, and the policies certified for it; without such, max-prob and patience."""
    model = model_of(task, variant, options.seed, options.data, options.runs)
    setting = Setting(task, model, options.data, options.runs / "cache", options.limit)
    given, encoded = setting.prompts("test", texts)
    states = setting.splits["test"].rows.encoded if task in PICTURED else None
    path = options.out / f"speed-{task}-{variant}.json"
    found = [each for each in read_json(path)["policies"] if each["policy"]] if path.exists() else []
    rules = {each["family"]: TokenPolicy(from_dict(each["policy"])) for each in found}
    if not rules:
        rules = {"max-prob": TokenPolicy(MaxProb((0.7,) * model.exits)), "patience": TokenPolicy(Patience(1))}
    return Case(
        f"{task}, trained", model, rules, given, 24 if task == "coco" else NEW, 1, encoded,
        None if states is None else states[: len(given)],
    )  # fmt: skip


def differing(ours: list[Any], theirs: list[Any]) -> tuple[int, int]:
    """(things compared, those that differ); what is behind the shorter of two rows differs too."""
    many = [max(len(a), len(b)) for a, b in zip(ours, theirs, strict=True)]
    same = [sum(x == y for x, y in zip(a, b, strict=False)) for a, b in zip(ours, theirs, strict=True)]
    return sum(many), sum(many) - sum(same)


def against_transformers(case: Case, size: int, beams: int) -> dict[str, Any]:
    """The whole decoder's tokens and those of transformers."""
    ours, theirs = list[Any](), list[Any]()
    for begin in range(0, len(case.given), size):
        given, more = case.part(begin, size)
        if beams > 1:
            said = search(case.model, None, given, beams=beams, **more)
        else:
            said = generate(case.model, None, given, **more)
        found = case.theirs(begin, size, num_beams=beams)
        ours += said.tokens
        for row in found:  # what is behind the end fills the batch up
            cut = row.index(case.end) + 1 if case.end in row else len(row)
            theirs.append(tuple(row[:cut]))
    compared, differ = differing(ours, theirs)
    return {"against": "beams" if beams > 1 else "transformers", "batch": size, "tokens": compared, "differ": differ}


def against_no_cache(case: Case) -> list[dict[str, Any]]:
    """Tokens and their exits under every policy, by batch size and by when skipped layers' keys are filled in."""
    found = list[dict[str, Any]]()
    for name, rule in case.rules.items():
        given, more = case.part(0, len(case.given))
        slow = generate_without_cache(case.model, rule, given, **more)
        left = len({exit_ for row in slow.exits for exit_ in row})
        wanted = [list(zip(*row, strict=True)) for row in zip(slow.tokens, slow.exits, strict=True)]
        for at_once in (False, True):
            for size in BATCHES:
                ours = list[Any]()
                for begin in range(0, len(case.given), size):
                    given, more = case.part(begin, size)
                    said = generate(case.model, rule, given, at_once=at_once, **more)
                    ours += [list(zip(*row, strict=True)) for row in zip(said.tokens, said.exits, strict=True)]
                compared, differ = differing(ours, wanted)
                found.append({"against": "at once" if at_once else "deferred", "policy": name, "batch": size,
                              "tokens": compared, "differ": differ, "exits": left})  # fmt: skip
    return found


def main() -> None:
    parser = parser_of(__doc__, threads=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", type=int, default=64, help="of each decoder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    decoders = list[dict[str, Any]]()
    for kind, variant in (*((kind, "") for kind in KINDS), *TRAINED):
        if variant and not (folder_of(kind, variant, options.seed, options.runs) / "cell.json").exists():
            print(f"{kind} {variant} is not trained: left out", flush=True)
            continue
        case = of_task(kind, variant, options.texts, options) if variant else of_kind(kind, options.texts)
        rows = [against_transformers(case, size, beams) for beams in (1, BEAMS) for size in BATCHES]
        rows += against_no_cache(case)
        compared, differ = (sum(row[each] for row in rows) for each in ("tokens", "differ"))
        print(f"{case.name}: {compared} tokens compared, {differ} differ", flush=True)
        decoders.append({"name": case.name, "texts": len(case.given), "policies": list(case.rules), "rows": rows})
    value = {"decoders": decoders, "beams": BEAMS, "seed": options.seed, "limit": options.limit,
             "threads": options.threads, "machine": machine_line(), "versions": versions()}  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"wrote {write_json(options.out / 'parity.json', value)}")


if __name__ == "__main__":
    main()
