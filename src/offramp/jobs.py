"""Named jobs: a network with its exits, its data and a recipe that is known to work."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offramp.attach import attach
from offramp.augment import CropFlip
from offramp.data import Examples
from offramp.demo import digits, resnet20, resnet56
from offramp.errors import DataError, ValueRangeError
from offramp.heads import TEXT_HEAD, MapHead, check_head
from offramp.machine import fast_precision
from offramp.model import MultiExitModel
from offramp.objectives import DepthWeighted, Objective, SelfDistill
from offramp.preprocess import Preprocess
from offramp.recipe import Recipe
from offramp.tasks import IMAGE_TASKS, TEXT_TASKS, load_images, load_text, minilm

__all__ = ["JOBS", "Job", "job"]


@dataclass(frozen=True)
class Job:
    """A network with exits, its data and a recipe.

    Args:
        name: what the command line calls it.
        build: makes the network with exits and, for text, its tokenizer (None otherwise).
        load: the rows of a split, given that tokenizer.
        splits: (train, calibrate, test) names; for SST-2 and such, calibration and test rows are halves of one split.
        objective, recipe: how it is trained.
        labels: names of the classes.
        note: what a reader of the figures must know, or "".
        preprocess: from a raw row to inputs, where rows come raw; None for named tasks.
        head: of every exit, where it can be chosen for a named task; None elsewhere.
    """

    name: str
    build: Callable[[], tuple[MultiExitModel, Any]]
    load: Callable[[str, Any], Any]
    splits: tuple[str, str, str]
    objective: Objective
    recipe: Recipe
    labels: tuple[str, ...]
    note: str = ""
    preprocess: Preprocess | None = None
    head: str | None = None


#: Large sets need fewer passes.
EPOCHS = {"sst2": 1, "qqp": 1, "mnli": 1, "ag_news": 2}

JOBS = ("digits", *IMAGE_TASKS, *TEXT_TASKS)


def job(
    name: str,
    *,
    data: str | Path | None = None,
    epochs: int | None = None,
    limit: int | None = None,
    max_length: int = 128,
    seed: int = 0,
    head: str | None = None,
) -> Job:
    """The job of that name.

    Args:
        name: one of `JOBS`.
        data: a folder laid out as `<name>/<split>.parquet`; None asks the hub. Digits need none.
        epochs: instead of the recipe's.
        limit: use at most so many training rows, by seed.
        max_length: of texts, in tokens.
        seed: of weights, order and augmentation.
        head: of every exit of a text task; None is "projected". Those of images are the task's own.

    Raises:
        ValueRangeError: the name or the head is unknown.
    """
    if head is not None and name in JOBS and name not in TEXT_TASKS:
        raise ValueRangeError(f"the heads of {name} are its own; a head can be named for texts, not {head!r}.")
    if name == "digits":
        return _digits(8 if epochs is None else epochs, limit, seed)
    if name in IMAGE_TASKS:
        return _images(name, data, 30 if epochs is None else epochs, limit, seed)
    if name in TEXT_TASKS:
        epochs = EPOCHS.get(name, 3) if epochs is None else epochs
        return _text(name, data, epochs, limit, max_length, seed, head or TEXT_HEAD)
    raise ValueRangeError(f"unknown task {name!r}; expected one of {', '.join(JOBS)}.")


def _digits(epochs: int, limit: int | None, seed: int) -> Job:
    def build() -> tuple[MultiExitModel, None]:
        train, _, _ = digits(seed=seed)
        network = resnet20(classes=10, ch_in=1, seed=seed)
        example = train.batch(torch.arange(2)).inputs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # heads are new weights, too
            return attach(network, at=("layer1", "layer2"), head=MapHead(grid=4), example=example), None

    def load(split: str, _: Any) -> Examples:
        parts = dict(zip(("train", "calibrate", "test"), digits(seed=seed), strict=True))
        return _limited(_part(parts, split), limit if split == "train" else None, seed)

    recipe = Recipe(epochs=epochs, batch_size=32, lr=4e-3, schedule="cosine", warmup=0.1, weight_decay=1e-2, seed=seed)
    names = tuple(str(i) for i in range(10))
    return Job("digits", build, load, ("train", "calibrate", "test"), DepthWeighted(), recipe, names)


def _images(name: str, data: str | Path | None, epochs: int, limit: int | None, seed: int) -> Job:
    task = IMAGE_TASKS[name]

    def build() -> tuple[MultiExitModel, None]:
        example = torch.zeros(2, 3, task.side, task.side)
        network = resnet56(classes=task.count, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return attach(network, at=("layer1", "layer2"), head="conv", example=example), None

    def load(split: str, _: Any) -> Examples:
        return _limited(load_images(name, data, split), limit if split == "train" else None, seed)

    recipe = Recipe(
        epochs=epochs, batch_size=128, lr=0.1, optimizer="sgd", weight_decay=5e-4, schedule="step", clip_norm=None,
        precision=fast_precision(), channels_last=True, augment=CropFlip(), seed=seed,
    )  # fmt: skip
    splits = ("train", task.held_out, task.held_out)
    return Job(name, build, load, splits, DepthWeighted(), recipe, task.classes or tuple(map(str, range(task.count))))


def _text(
    name: str, data: str | Path | None, epochs: int, limit: int | None, max_length: int, seed: int, head: str
) -> Job:
    task = TEXT_TASKS[name]
    check_head(head)

    def build() -> tuple[MultiExitModel, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network, tokenizer = minilm(len(task.classes))
            example = dict(tokenizer(["a first sentence", "and another one"], padding=True, return_tensors="pt"))
            at = tuple(f"bert.encoder.layer.{i}" for i in range(5))
            return attach(network, at=at, head=head, example=example), tokenizer

    def load(split: str, tokenizer: Any) -> Examples:
        rows = load_text(name, data, split, tokenizer, max_length=max_length)
        return _limited(rows, limit if split == "train" else None, seed)

    note = ""
    if name == "sst2":
        note = (
            "SST-2's training rows are phrases and its validation rows are sentences, so thresholds are calibrated on "
            "half of the sentences and tested on the other half. Calibrated on held-out phrases, policies overspend."
        )
    recipe = Recipe(epochs=epochs, batch_size=32, lr=5e-5, head_lr=1e-3, precision=fast_precision(), seed=seed)
    splits = ("train", task.held_out, task.held_out)
    return Job(name, build, load, splits, SelfDistill(), recipe, task.classes, note, head=head)


def _part(parts: dict[str, Examples], split: str) -> Examples:
    if split not in parts:
        raise DataError(f"there is no split {split!r}; expected one of {', '.join(parts)}.")
    return parts[split]


def _limited(rows: Examples, limit: int | None, seed: int) -> Examples:
    if limit is None or limit >= len(rows):
        return rows
    if limit < 1:
        raise ValueRangeError(f"the limit is {limit} rows; expected at least 1.")
    picked = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:limit]
    return rows.select(picked.sort().values)
