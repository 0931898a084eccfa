"""One training of BEEM's table or of the ablation: a task, a variant and a seed, in a process of its own.

    python -m experiments.beem.cells rte plain-first 0 --data DIR

Writes runs/beem/TASK-VARIANT-SEED/{model.safetensors,trace.safetensors,costs.json,cell.json}. Given again after a
stop, it goes on; a finished one is not trained again.
"""

import argparse
import hashlib
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from offramp import (
    Alternating,
    DepthWeighted,
    Distill,
    Examples,
    FinalOnly,
    Recipe,
    SelfDistill,
    TokenHead,
    TwoStage,
    Weighted,
    attach,
    measure,
    record,
    train,
)  # fmt: skip
from offramp.artefacts import write_atomically, write_json
from offramp.checkpoints import named_tensors
from offramp.machine import fast_precision, machine_line, versions
from offramp.objectives import Objective
from offramp.record import predict
from offramp.splits import stratified_split
from offramp.tasks import TEXT_TASKS, load_text, minilm

LAYERS = 6
ROWS = {"sst2": 20_000}  # of the training set; the others are taken whole
EPOCHS = {"sst2": 2, "sst2-full": 2, "ag_news": 2}  # 3 for the others
LENGTH = {"rte": 128, "qnli": 128, "mrpc": 128}


@dataclass(frozen=True)
class Variant:
    """How a network is trained.

    Args:
        objective: what is minimised.
        head: of every exit.
        recipe: what differs from the common recipe.
        layers: of the network; fewer than six is a static network, of which the mean head behind its last layer counts.
        epochs: times as many as the others.
        after: the variant whose finished network this one begins with, and which then is the teacher.
    """

    objective: Objective
    head: Any = "mean"
    recipe: tuple[tuple[str, Any], ...] = ()
    layers: int = LAYERS
    epochs: float = 1.0
    after: str | None = None


BUDGET = (0.5, 1.0, 1.5, 1.5, 1.0, 1.5)  # exits that leave rows under budgets of 40 to 60 %, and the last
PROJECTED = TokenHead("mean", pooler="own")  # a projection, as the classifier of the whole network has
PLAIN_FIRST = TwoStage(FinalOnly(), SelfDistill(), freeze=False, first_share=0.67)  # "taught-self" in one run


def _taught(objective: Objective, **other: Any) -> Variant:
    """Exits put on a fine-tuned network, which is the teacher too, and half as many epochs for everything."""
    recipe = tuple((key, other.pop(key)) for key in ("gradients", "layer_decay") if key in other)
    return Variant(objective, **{"recipe": recipe, "after": "plain", "epochs": 0.5, **other})


VARIANTS: dict[str, Variant] = {
    "plain": Variant(FinalOnly()),
    "plain-longer": Variant(FinalOnly(), epochs=1.5),  # as long as "longer", or as "plain" and what follows it
    **{f"static-{k}": Variant(Weighted((1.0, 0.0)), layers=k) for k in (2, 3, 4)},
    **{f"static-{k}-longer": Variant(Weighted((1.0, 0.0)), layers=k, epochs=1.5) for k in (2, 3, 4)},
    **{f"static-{k}-pooler": Variant(Weighted((1.0, 0.0)), PROJECTED, layers=k, epochs=1.5) for k in (2, 3, 4)},
    # from the pretrained network, as the papers do
    "depth": Variant(DepthWeighted()),
    "longer": Variant(DepthWeighted(), epochs=1.5),
    "longer-self": Variant(SelfDistill(), epochs=1.5),
    "longer-pooler": Variant(DepthWeighted(), PROJECTED, epochs=1.5),
    "longer-self-pooler": Variant(SelfDistill(), PROJECTED, epochs=1.5),
    "plain-first": Variant(PLAIN_FIRST, epochs=1.5),
    "heads-after": Variant(DepthWeighted(), after="plain", epochs=0.5, recipe=(("frozen", "backbone"),)),
    # from the fine-tuned network, as a user has it; one thing at a time differs from "taught"
    "taught": _taught(Distill()),
    "taught-labels": _taught(DepthWeighted()),
    "taught-pure": _taught(Distill(alpha=0.0)),
    "taught-self": _taught(SelfDistill()),
    "taught-uniform": _taught(Distill(weights="uniform")),
    "taught-budget": _taught(Distill(weights=BUDGET)),
    "taught-alternating": _taught(Alternating(then=Distill())),
    "taught-equilibrium": _taught(Distill(), gradients="equilibrium"),
    "taught-detached": _taught(Distill(), gradients="detached"),
    "taught-layer-decay": _taught(Distill(), layer_decay=0.85),
    "taught-attention": _taught(Distill(), head=TokenHead("attention")),
    "taught-pooler": _taught(Distill(), head=PROJECTED),
    "taught-self-pooler": _taught(SelfDistill(), head=PROJECTED),
    "taught-longer": _taught(Distill(), epochs=1.0),
}


def rows_of(task: str, data: Path, tokenizer: Any) -> tuple[Examples, Examples]:
    """(training rows, rows that training never sees)."""
    name = task.removesuffix("-full")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows that are cut, which cell.json counts
        load: Callable[[str], Examples] = lambda split: load_text(  # noqa: E731
            name, data, split, tokenizer, max_length=LENGTH.get(name, 64)
        )
        if name == "qnli":  # only its validation rows are here
            whole = load("validation")
            train_rows, held_out = (whole.select(part) for part in stratified_split(whole.labels, (0.6, 0.4)))
        else:
            train_rows, held_out = load("train"), load(TEXT_TASKS[name].held_out)
    limit = ROWS.get(task)
    if limit is not None:
        picked = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(0))[:limit]
        train_rows = train_rows.select(picked.sort().values)
    return train_rows, held_out


def network_of(task: str, variant: Variant, seed: int) -> tuple[Any, Any]:
    """(the network with its exits, the tokenizer)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, tokenizer = minilm(len(TEXT_TASKS[task.removesuffix("-full")].classes))
        network.bert.encoder.layer = network.bert.encoder.layer[: variant.layers]
        network.config.num_hidden_layers = variant.layers
        example = dict(tokenizer(["a first sentence", "and another one"], padding=True, return_tensors="pt"))
        taps = range(LAYERS - 1) if variant.layers == LAYERS else [variant.layers - 1]
        at = tuple(f"bert.encoder.layer.{i}" for i in taps)
        return attach(network, at=at, head=variant.head, example=example), tokenizer


def epochs_of(task: str, variant: Variant) -> int:
    return max(1, math.ceil(EPOCHS.get(task, 3) * variant.epochs))


def folder_of(task: str, name: str, seed: int, runs: Path) -> Path:
    return runs / f"{task}-{name}-{seed}"


def cell(task: str, name: str, seed: int, data: Path, runs: Path, *, progress: bool = True) -> dict[str, Any]:
    """What came of one training; see the file's head."""
    folder, variant = folder_of(task, name, seed, runs), VARIANTS[name]
    told = folder / "cell.json"
    if told.exists():
        return json.loads(told.read_text(encoding="utf-8"))
    model, tokenizer = network_of(task, variant, seed)
    train_rows, held_out = rows_of(task, data, tokenizer)
    # SST-2's cells were begun in fp32, and what is compared is trained alike
    precision = "fp32" if task == "sst2" else fast_precision()
    common = Recipe(
        epochs=epochs_of(task, variant), batch_size=32, lr=5e-5, head_lr=1e-3, seed=seed, precision=precision
    )
    recipe = replace(common, **dict(variant.recipe))
    teacher = None
    if variant.after is not None:
        before = folder_of(task, variant.after, seed, runs)
        _begin_with(model, before)
        teacher = _teacher(model, train_rows, before / "teacher.safetensors")
    report = train(
        model, train_rows, objective=variant.objective, recipe=recipe, teacher=teacher, validation=held_out,
        checkpoint=folder / "checkpoint", progress=progress,
    )  # fmt: skip
    trace = record(model, held_out, progress=False)
    trace.save(folder / "trace.safetensors", half=True)
    measure(model, held_out.batch(torch.arange(32)).inputs, batch_sizes=()).save(folder / "costs.json")
    value = {
        "task": task, "variant": name, "seed": seed, "accuracy": trace.accuracy(), "rows": len(train_rows),
        "held_out": len(held_out), "cut": train_rows.truncated + held_out.truncated, "recipe": recipe.describe(),
        "objective": repr(variant.objective), "head": repr(variant.head), "layers": variant.layers,
        "seconds": report.seconds, "samples_per_s": report.samples_per_s, "threads": torch.get_num_threads(),
        "machine": machine_line(), "versions": versions(),
        "data": {"train": train_rows.fingerprint(), "held_out": held_out.fingerprint()},
        "weights_sha256": _weights(model, folder),
    }  # fmt: skip
    write_json(told, value)
    (folder / "checkpoint" / "train.safetensors").unlink(missing_ok=True)
    (folder / "checkpoint" / "teacher.safetensors").unlink(missing_ok=True)
    return value


def _teacher(model: Any, rows: Examples, path: Path) -> torch.Tensor:
    """What the network that a training begins with says of the training rows; made once for all that begin with it."""
    if not path.exists():
        said = predict(model, rows, batch_size=64)[0][-1].contiguous()
        write_atomically(path, lambda to: save_file({"logits": said}, to))
    return load_file(path)["logits"]


def _begin_with(model: Any, folder: Path) -> None:
    """The backbone of a finished cell."""
    if not (folder / "cell.json").exists():
        raise SystemExit(f"{folder} is not trained yet; train it first")
    saved = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, tensor in named_tensors(model):
            if name.startswith("backbone."):
                tensor.copy_(saved[name])


def _weights(model: Any, folder: Path) -> str:
    """The checksum of the weights, which are kept beside the trace."""
    tensors = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in named_tensors(model)
    }
    path = write_atomically(folder / "model.safetensors", lambda partial: save_file(tensors, partial))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("seed", type=int)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/beem"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    value = cell(options.task, options.variant, options.seed, options.data, options.runs)
    told = " ".join(f"{100 * each:.1f}" for each in value["accuracy"])
    print(f"{options.task} {options.variant} {options.seed}: {told}; {value['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
