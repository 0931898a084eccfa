"""A job on a user's own data and network: what it is made of, how it begins, and how a run makes it again."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offramp.attach import attach
from offramp.data import Examples
from offramp.errors import DataError, ValueRangeError
from offramp.heads import TEXT_HEAD, check_head
from offramp.jobs import Job
from offramp.machine import fast_precision
from offramp.model import MultiExitModel
from offramp.networks import (
    Network,
    check_network,
    example_of,
    labels_of,
    load_network,
    load_tokenizer,
    preprocess_of,
    rebuild_network,
)
from offramp.objectives import DepthWeighted, SelfDistill
from offramp.owndata import (
    SPLITS,
    Own,
    absolute,
    all_rows,
    checker,
    columns_of,
    fingerprints,
    in_order,
    leaks,
    part_called,
    parts_of,
    rows_of,
    typical_size,
)
from offramp.placement import place
from offramp.preprocess import ImagePreprocess, NumberPreprocess, Preprocess, TextPreprocess
from offramp.recipe import Recipe
from offramp.sources import Columns, Labelled, as_data

__all__ = ["SPLITS", "Own", "OwnJob", "default_head", "own_job", "prepare", "rows_of"]

# (steps to take about, least and most epochs) of networks that have learnt before and of new ones
STEPS = {True: (300, 2, 15), False: (1500, 5, 40)}
WORDS = {"text": "texts", "image": "images", "numbers": "numbers"}
FEW = 500  # training rows up to which batches are small, so that there are more steps


@dataclass(frozen=True, eq=False)
class OwnJob:
    """A job that was prepared: everything that training needs, and what a person should know of it.

    Args:
        own: with columns, classes, taps and fingerprints filled in.
        columns: what was guessed or given.
        parts: rows for training, calibrating and testing.
        network: as it was loaded.
        preprocess: from row to inputs.
        model: the network with its exits.
        job: for `train`, `record` and the rest.
        notes: for a person.
    """

    own: Own
    columns: Columns
    parts: tuple[Labelled, ...]
    network: Network
    preprocess: Preprocess
    model: MultiExitModel
    job: Job
    notes: tuple[str, ...]


def prepare(own: Own) -> OwnJob:
    """The job, after the data were read and the network got its exits.

    Raises:
        DataError: the data or the network cannot be used; the message says what to do.
        ValueRangeError: exits cannot be placed.
    """
    own = dataclasses.replace(
        own,
        data=absolute(own.data),
        validation=None if own.validation is None else absolute(own.validation),
        test=None if own.test is None else absolute(own.test),
    )
    check_head(own.head)
    known = labels_of(own.model)  # first, so that a slip in the name shows before the data were read
    columns = columns_of(own)
    parts, notes = parts_of(own, columns, checker(columns))
    parts = in_order(parts, known)
    notes += leaks(parts)
    classes = parts[0].classes
    channels = 1 if own.grey else 3
    network = load_network(own.model, classes, channels=channels, seed=own.seed)
    preprocess = _preprocess(own, columns, network, parts[0])
    if isinstance(preprocess, ImagePreprocess):
        height, width = preprocess.size
        notes.append(f"images are brought to {height} x {width}, {preprocess.mode} ({preprocess.fit})")
    model = _attached(dataclasses.replace(own, classes=classes), network.module, preprocess)
    own = dataclasses.replace(
        own,
        text=columns.inputs,
        label=columns.label,
        kind=columns.kind,
        at=model.taps,
        head=own.head or default_head(columns.kind),
        classes=classes,
        fingerprints=fingerprints(own, columns, parts),
        rows=tuple(len(part.rows) for part in parts),
    )
    found = dict(zip(SPLITS, parts, strict=True))

    def load(split: str, _: Any) -> Any:
        return _data(preprocess, part_called(found, split))

    pretrained = network.kind is not None and hasattr(network.module, "config")
    job = _job(own, len(parts[0].rows), lambda: (model, None), load, preprocess, pretrained=pretrained)
    return OwnJob(own, columns, tuple(parts), network, preprocess, model, job, (*notes, *network.notes))


def own_job(own: Own, preprocess: Preprocess, folder: Path) -> Job:
    """The job of a run: its network from what the run keeps, its rows from where they were.

    Args:
        folder: of the network's configuration.
    """

    def build() -> tuple[MultiExitModel, None]:
        module = rebuild_network(folder, own.model, own.classes, channels=1 if own.grey else 3, seed=own.seed)
        return _attached(own, module, preprocess), None

    kept: dict[str, Labelled] = {}

    def load(split: str, _: Any) -> Any:
        if not kept:
            kept.update(all_rows(own))
        return _data(preprocess, part_called(kept, split))

    return _job(own, FEW, build, load, preprocess)


def _data(preprocess: Preprocess, part: Labelled) -> Any:
    """The rows for training and recording; a trace calls them by their numbers in the source."""
    data = as_data(preprocess, part.rows, part.labels)
    if isinstance(data, Examples):
        data.ids = torch.tensor(part.numbers, dtype=torch.int64)
    return data


def _preprocess(own: Own, columns: Columns, network: Network, train: Labelled) -> Preprocess:
    """How rows become inputs of the network."""
    kind = network.kind or columns.kind
    if kind != columns.kind:
        raise DataError(
            f"--model {own.model} takes {WORDS[kind]}, but the data have {WORDS[columns.kind]} in "
            f"{', '.join(columns.inputs[:8])}. "
            "Give another --model, or say which columns: --text."
        )
    mode = "L" if own.grey or _channels(network.module) == 1 else "RGB"
    made = preprocess_of(network, columns.inputs, max_length=own.max_length, image_size=own.image_size, mode=mode)
    if made is not None:
        return made
    if kind == "image":
        size = own.image_size or typical_size(train.rows, columns.inputs[0])
        return ImagePreprocess(size, mode=mode, column=columns.inputs[0])
    if kind == "numbers":
        return NumberPreprocess.fitted(train.rows, columns.inputs)
    if own.tokenizer is None:
        raise DataError(
            f"the data are texts, and --model {own.model} brings no tokenizer. Give one: --tokenizer FOLDER (of "
            "transformers)."
        )
    return TextPreprocess.of(load_tokenizer(own.tokenizer), columns.inputs, own.max_length, _names(network))


def _channels(module: torch.nn.Module) -> int | None:
    """Those that the first convolution takes."""
    return next((part.in_channels for part in module.modules() if isinstance(part, torch.nn.Conv2d)), None)


def _names(network: Network) -> tuple[str, ...]:
    import inspect

    wanted = inspect.signature(network.module.forward).parameters
    return tuple(name for name in ("input_ids", "attention_mask", "token_type_ids") if name in wanted) or ("input_ids",)


def _attached(own: Own, module: torch.nn.Module, preprocess: Preprocess) -> MultiExitModel:
    example = example_of(preprocess)
    check_network(module, example, hint=_hint(preprocess))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(own.seed)
        at = own.at or place(module, example, every=own.every)
        made = attach(module, at=at, head=own.head or default_head(preprocess.kind), example=example)
    if own.classes and made.classes != len(own.classes):
        raise ValueRangeError(
            f"--model {own.model} gives {made.classes} classes; the data have {len(own.classes)}. Let the function "
            "take `classes`, or give data of its own classes."
        )
    return made


def _hint(preprocess: Preprocess) -> str:
    if isinstance(preprocess, ImagePreprocess):
        return "If it takes images of another size, say so: --image-size SIDE; of one channel: --grey."
    if isinstance(preprocess, NumberPreprocess):
        return f"It is fed the columns {', '.join(preprocess.columns[:8])}; choose others with --text."
    return "It is fed what the tokenizer makes, by name; its forward must take these."


def default_head(kind: str | None) -> str:
    """The head of every exit unless one is named, for what the network is fed."""
    return TEXT_HEAD if kind == "text" else "auto"


def _job(own: Own, rows: int, build: Any, load: Any, preprocess: Preprocess, *, pretrained: bool = False) -> Job:
    """The job with a recipe: gentle for a network that has learnt before, quicker for one that has not."""
    size = 16 if rows <= FEW else 32
    steps, least, most = STEPS[pretrained]
    epochs = max(least, min(most, -(-steps * size // rows)))
    if pretrained:
        rates: dict[str, Any] = {"lr": 5e-5, "head_lr": 1e-3}
    else:
        rates = {"lr": 1e-3 if preprocess.kind == "text" else 2e-3}
    recipe = Recipe(
        epochs=epochs if own.epochs is None else own.epochs,
        batch_size=size,
        schedule="cosine",
        warmup=0.1,
        precision=fast_precision(),
        seed=own.seed,
        **rates,
    )
    name = Path(own.data).name or own.data
    # what is best for texts (docs/results.md, better exits) was not tried on images
    objective = SelfDistill() if preprocess.kind == "text" else DepthWeighted()
    return Job(name, build, load, SPLITS, objective, recipe, own.classes, "", preprocess)
