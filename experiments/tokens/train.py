"""One training of the experiments with tokens: a task and a variant.

    python -m experiments.tokens.train scenes plain --data DIR       # the decoder alone, its last layer
    python -m experiments.tokens.train scenes exits --data DIR       # goes on from it, every exit taught by the last
    python -m experiments.tokens.train scenes whole-keys --data DIR  # the same, but no token leaves while it learns
    python -m experiments.tokens.train scenes joint --data DIR       # all exits alike from the start, none leaves
    python -m experiments.tokens.train scenes joint-exits --data DIR # goes on from it, as exits does
    python -m experiments.tokens.train scenes heads --data DIR       # heads alone on the frozen decoder, as the paper
    python -m experiments.tokens.train scenes shallow-4 --data DIR   # what a user would take instead

Writes runs/tokens/TASK-VARIANT-SEED/{model.safetensors,cell.json}. Given again after a stop, it goes on.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from experiments.tokens.networks import LAYERS, TASKS, exits_of, network_of, rows_of, tokenizer_of
from safetensors.torch import load_model, save_model

from offramp import FinalOnly, Recipe, SelfDistill, train
from offramp.artefacts import write_atomically, write_json
from offramp.generation import TokenExits, record_tokens
from offramp.machine import fast_precision, machine_line, versions
from offramp.meter import duration

#: without an entry, as many as plain
EPOCHS = {("scenes", "plain"): 3, ("scenes", "exits"): 2, ("scenes", "heads"): 1,
          ("flickr8k", "plain"): 15, ("flickr8k", "exits"): 5, ("flickr8k", "heads"): 3,
          ("coco", "plain"): 6, ("coco", "exits"): 3, ("coco", "heads"): 2}  # fmt: skip
WITH_EXITS = ("plain", "exits", "whole-keys", "joint", "joint-exits", "heads")
VARIANTS = (*WITH_EXITS, "shallow-1", "shallow-2", "shallow-3", "shallow-4", "shallow-6")
AFTER = {"exits": "plain", "whole-keys": "plain", "heads": "plain", "joint-exits": "joint"}
LIKE = {"whole-keys": "exits", "joint-exits": "exits"}  # trained as long as


def folder_of(task: str, variant: str, seed: int, runs: Path) -> Path:
    return runs / f"{task}-{variant}-{seed}"


def model_of(task: str, variant: str, seed: int, data: Path, runs: Path, *, trained: bool = True) -> TokenExits:
    """The model of a cell."""
    layers = int(variant.removeprefix("shallow-")) if variant.startswith("shallow") else LAYERS
    vocabulary = len(tokenizer_of(task, data, runs / "cache"))
    model = exits_of(network_of(task, layers, data, vocabulary, seed), task, joint=variant.startswith("joint"))
    if trained:
        folder = folder_of(task, variant, seed, runs)
        if not (folder / "cell.json").exists():
            raise SystemExit(f"{folder} is not trained yet: python -m experiments.tokens.train {task} {variant}")
        load_model(model, str(folder / "model.safetensors"))
    return model.eval()


def cell(task: str, variant: str, seed: int, data: Path, runs: Path, *, limit: int | None = None) -> dict[str, Any]:
    """What came of a training."""
    folder = folder_of(task, variant, seed, runs)
    told = folder / "cell.json"
    if told.exists():
        return json.loads(told.read_text(encoding="utf-8"))
    before = AFTER.get(variant)
    model = model_of(task, before or variant, seed, data, runs, trained=before is not None)
    rows = rows_of(task, "train", data, runs / "cache", limit=limit).rows
    model.rehearse = variant in ("exits", "joint-exits")
    epochs = EPOCHS.get((task, LIKE.get(variant, variant)), EPOCHS[task, "plain"])
    lr = 1e-3 if before is None else 3e-4
    recipe = Recipe(
        epochs=epochs, batch_size=32, lr=lr, head_lr=1e-3, schedule="cosine", seed=seed,
        frozen="backbone" if variant == "heads" else None, precision=fast_precision(),
    )  # fmt: skip
    # the paper's heads learn half from labels and half from the last layer, at temperature 1, alike at all layers
    goal = FinalOnly() if before is None else SelfDistill()
    if variant.startswith("joint"):
        goal = SelfDistill(weights="uniform")
    if variant == "heads":
        goal = SelfDistill(temperature=1.0, weights="uniform")
    print(f"{task} {variant}: {rows.tokens} tokens, {epochs} epochs", flush=True)
    report = train(model, rows, objective=goal, recipe=recipe, checkpoint=folder / "checkpoint")
    held = rows_of(task, "calibrate", data, runs / "cache", limit=limit).rows
    right = record_tokens(model, held, progress=False).accuracy()
    value = {
        "task": task, "variant": variant, "seed": seed, "objective": repr(goal), "recipe": recipe.describe(),
        "rows": len(rows), "tokens": rows.tokens, "token_accuracy": right, "seconds": report.seconds,
        "threads": torch.get_num_threads(), "machine": machine_line(), "versions": versions(),
        "data": rows.fingerprint(), "limit": limit,
    }  # fmt: skip
    write_atomically(folder / "model.safetensors", lambda partial: save_model(model, str(partial)))
    write_json(told, value)
    (folder / "checkpoint" / "train.safetensors").unlink(missing_ok=True)
    return value


def parser_of(text: str | None, *, variants: Sequence[str] = (), threads: int = 2) -> argparse.ArgumentParser:
    """What these scripts are asked in common; with variants, also the task and one of them."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if variants:
        parser.add_argument("task", choices=TASKS)
        parser.add_argument("variant", choices=variants)
        parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/tokens"))
    parser.add_argument("--out", type=Path, default=Path("results/tokens"))
    parser.add_argument("--limit", type=int, default=None, help="scenes, or images with captions: to try it out")
    parser.add_argument("--threads", type=int, default=threads)
    return parser


def main() -> None:
    options = parser_of(__doc__, variants=VARIANTS).parse_args()
    torch.set_num_threads(options.threads)
    value = cell(options.task, options.variant, options.seed, options.data, options.runs, limit=options.limit)
    right = " ".join(f"{100 * each:.1f}" for each in value["token_accuracy"])
    print(f"{options.task} {options.variant}: tokens right {right}; {duration(value['seconds'])}", flush=True)


if __name__ == "__main__":
    main()
