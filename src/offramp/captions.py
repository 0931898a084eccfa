"""Images and what people said of them: COCO and Flickr8k, in the hub's layouts and as folders."""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from offramp.artefacts import read_json
from offramp.data import seed_for
from offramp.errors import DataError
from offramp.preprocess import ImagePreprocess
from offramp.sources import open_source
from offramp.tokenrows import TokenRows

__all__ = ["Captioned", "load_captions"]

IMAGES = ("image", "img", "filepath", "file_name")
CAPTIONS = ("captions", "caption", "sentences_raw", "sentences", "raw", "text")
PARTS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}  # of a folder without splits


@dataclass(frozen=True)
class Captioned:
    """Images with captions.

    Args:
        images: for each image its file, or its bytes as the hub has them.
        captions: what people said of it, one or more.
    """

    images: tuple[Any, ...]
    captions: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, preprocess: ImagePreprocess) -> Shaped[Tensor, "image ch height width"]:
        """Every image, uint8, resized and cut as the preprocessing says, not yet normalised.

        Raises:
            DataError: one cannot be read; the message has its number.
        """
        found = []
        for i, image in enumerate(self.images):
            try:
                found.append(preprocess.pixels({preprocess.column: image}))
            except DataError as error:
                raise DataError(f"image {i}: {error}") from None
        return torch.stack(found)

    def rows(
        self, encode: Callable[[str], Sequence[int]], *, begin: int, end: int,
        preprocess: ImagePreprocess | None = None, encoded: Tensor | None = None,
    ) -> TokenRows:  # fmt: skip
        """A row to learn from for every caption: `begin`, its tokens, `end`, over the image's pixels or states.

        Args:
            encode: from a caption to token numbers.
            preprocess: of the images; or
            encoded: what a frozen encoder gave for each of them [image memory dim].
        """
        ids, image = [], []
        for i, said in enumerate(self.captions):
            for caption in said:
                ids.append([begin, *encode(caption), end])
                image.append(i)
        if encoded is not None:
            return TokenRows(ids, pad=end, encoded=encoded, image=torch.tensor(image))
        if preprocess is None:
            raise DataError("give preprocess=, to take images, or encoded=, what an encoder gave for them.")
        normalise = preprocess.normalise

        def prepare(pixels: Tensor) -> Tensor:
            made = normalise(pixels)
            return made if isinstance(made, Tensor) else next(iter(made.values()))

        return TokenRows(ids, pad=end, images=self.pixels(preprocess), image=torch.tensor(image), prepare=prepare)


def load_captions(source: str | Path, split: str, *, seed: int = 0) -> Captioned:
    """One split of images with captions.

    Args:
        source: a folder with Karpathy's `dataset_coco.json`, `dataset_flickr8k.json` or such, and the images somewhere
            in it; a folder with `captions.txt` (image,caption) and `Images/`; a folder or file that the hub's layout
            has, e.g. `train.parquet` with an image and captions; or the name of a data set on the hub.
        split: "train", "validation" or "test"; of Karpathy's, "train" takes in "restval". Where a folder has no splits,
            images are dealt by seed, 8 to 1 to 1.

    Raises:
        DataError: there is no such split, no image or no caption in it, or a file is missing.
    """
    folder = Path(source)
    told = sorted(folder.glob("dataset*.json")) if folder.is_dir() else []
    if told:
        return _karpathy(folder, told[0], split)
    if (folder / "captions.txt").is_file():
        return _listed(folder, split, seed)
    opened = open_source(source)
    if split not in opened.splits:
        raise DataError(f"{source} has {_named('splits', opened.splits)}; got {split!r}.")
    image = next((name for name in IMAGES if name in opened.columns), None)
    several = [name for name in opened.columns if re.fullmatch(r"caption_?\d+", name)]
    column = next((name for name in CAPTIONS if name in opened.columns), None)
    if image is None or (column is None and not several):
        raise DataError(
            f"{source} has the columns {', '.join(opened.columns)}; expected one of {', '.join(IMAGES)} and one of "
            f"{', '.join(CAPTIONS)}, or caption_0, caption_1, ..."
        )
    rows = [row for _, row in opened.rows(split)]
    images, captions = dict[Any, Any](), dict[Any, list[str]]()
    for number, row in enumerate(rows):
        key = _same(row[image], number)  # where each caption has a row of its own, an image comes again
        images.setdefault(key, row[image])
        said = [row[column]] if column is not None else [row[name] for name in several]
        try:
            captions.setdefault(key, []).extend(_said(said))
        except (TypeError, KeyError):
            raise DataError(f"{source} {split}: row {number} has a caption that is no text: {said!r:.80}.") from None
    return _made(source, split, list(images.values()), list(captions.values()))


def _named(what: str, names: Sequence[str]) -> str:
    return f"the {what} {', '.join(names)}" if names else f"no {what}"


def _same(image: Any, number: int) -> Any:
    """What tells an image from others: its bytes or file, or where it has neither, its row."""
    if isinstance(image, Mapping):  # a path beside bytes is a bare name, and others may have it, too
        image = image.get("bytes") or image.get("path")
    return image if isinstance(image, str | bytes | Path) else number


def _said(value: Any) -> list[str]:
    """Captions in any of the hub's shapes: a text, texts, or mappings with `raw`."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return _said(value["raw"])
    return [text for each in (() if value is None else value) for text in _said(each)]


def _karpathy(folder: Path, path: Path, split: str) -> Captioned:
    wanted = {"train": ("train", "restval"), "validation": ("val",)}.get(split, (split,))
    places: dict[str, Path] = {}
    images, captions = [], []
    entries = read_json(path).get("images")
    if not isinstance(entries, list):
        raise DataError(f"{path} has no list of images; expected Karpathy's json with images, filename and sentences.")
    for number, entry in enumerate(entries):
        try:
            if entry.get("split") not in wanted:
                continue
            name, said = entry["filename"], [sentence["raw"] for sentence in entry["sentences"]]
            near = folder / entry.get("filepath", "") / name
        except (AttributeError, KeyError, TypeError) as error:
            lack = f"no {error}" if isinstance(error, KeyError) else "another shape"
            raise DataError(
                f"{path.name}: image {number} has {lack}; expected split, filename, and sentences with raw."
            ) from None
        if not all(isinstance(text, str) for text in said):
            raise DataError(f"{path.name}: image {number} has a caption that is no text.")
        if not near.is_file():
            places = places or {found.name: found for found in folder.rglob("*") if found.is_file()}
            near = places.get(name, near)
        if not near.is_file():
            raise DataError(f"{path.name} names {name}, which is not in {folder}. Put the images there.")
        images.append(near)
        captions.append(said)
    return _made(path, split, images, captions)


def _listed(folder: Path, split: str, seed: int) -> Captioned:
    if split not in PARTS:
        raise DataError(f"the split is {split!r}; expected one of {', '.join(PARTS)}.")
    said = _lines(folder / "captions.txt")
    generator = torch.Generator().manual_seed(seed_for(seed, 0))
    names = [sorted(said)[i] for i in torch.randperm(len(said), generator=generator).tolist()]
    low, high = (round(part * len(names)) for part in PARTS[split])
    root = folder / "Images" if (folder / "Images").is_dir() else folder
    if missing := [name for name in names[low:high] if not (root / name).is_file()]:
        raise DataError(f"{folder / 'captions.txt'} names {missing[0]}, which is not in {root}. Put the images there.")
    return _made(folder, split, [root / name for name in names[low:high]], [said[name] for name in names[low:high]])


def _lines(path: Path) -> dict[str, list[str]]:
    """Captions by the name of their image, of a file with the columns image and caption."""
    said: dict[str, list[str]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            head = [name.strip().lower() for name in next(reader, [])]
            if not {"image", "caption"} <= set(head):
                raise DataError(f"{path} begins with {', '.join(head) or 'nothing'}; expected a line 'image,caption'.")
            i, j = head.index("image"), head.index("caption")
            # what follows a comma without quotes belongs to the caption, where it is the last column
            last = None if j == len(head) - 1 else j + 1
            for row in filter(None, reader):
                name, caption = "".join(row[i : i + 1]).strip(), ",".join(row[j:last]).strip()
                if not (name and caption):
                    raise DataError(f"{path}, line {reader.line_num}: there is no image, or no caption.")
                said.setdefault(name, []).append(caption)
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; save it as such.") from None
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}. Is a quote not closed?") from None
    return said


def _made(source: Any, split: str, images: Sequence[Any], captions: Sequence[Sequence[str]]) -> Captioned:
    if not images:
        raise DataError(f"{source} has no image in the split {split!r}.")
    if bare := [i for i, each in enumerate(captions) if not each or not all(text.strip() for text in each)]:
        raise DataError(f"{source} {split}: image {bare[0]} has no caption, or an empty one.")
    return Captioned(tuple(images), tuple(tuple(text.strip() for text in each) for each in captions))
