"""Scenes of CIFAR-10 photographs in a grid, with captions that name objects and say where they are.

    python -m experiments.tokens.scenes --data DIR --out scenes --count 8      # look at some

Two to four photographs of different classes lie in a grid of 2 x 2; captions begin with the first of them in reading
order and say how it lies to the others. Nouns are hard, words between them easy.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from offramp.tasks import load_images

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BEGINNINGS = ("", "there is ", "you can see ")
SIDE, CELLS, GREY, REFERENCES = 32, 4, 124, 5

#: split -> (which of CIFAR-10's splits, which share of its photographs, scenes, seed)
SPLITS = {
    "train": ("train", (0.0, 0.9), 20_000, 1),
    "calibrate": ("train", (0.9, 1.0), 500, 2),
    "certify": ("test", (0.0, 0.5), 1_500, 3),
    "test": ("test", (0.5, 1.0), 1_500, 4),
}


@dataclass(frozen=True)
class Scenes:
    """Scenes.

    Args:
        images: uint8 [scene 3 64 64].
        captions: for each scene `REFERENCES` captions.
    """

    images: Tensor
    captions: list[list[str]]


def article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def relation(a: int, b: int) -> str:
    """How the object in cell a lies to that in cell b."""
    words = []
    if a // 2 != b // 2:
        words.append("above" if a // 2 < b // 2 else "below")
    if a % 2 != b % 2:
        words.append("left of" if a % 2 < b % 2 else "right of")
    return " and ".join(words)


def caption(objects: list[tuple[int, str]], dice: random.Random) -> str:
    """One caption of objects (cell, name) in reading order."""
    (cell, first), *others = objects
    others = others if dice.random() < 0.7 else others[::-1]
    parts = [f"{relation(cell, other)} {article(name)}" for other, name in others]
    return (
        dice.choice(BEGINNINGS) + f"{article(first)} {', '.join(parts[:-1]) + ' and ' if parts[1:] else ''}{parts[-1]}"
    )


def scenes(split: str, data: Path, count: int | None = None) -> Scenes:
    """The scenes of a split, the same for the same data; photographs of test scenes are of CIFAR-10's test set."""
    source, (low, high), most, seed = SPLITS[split]
    photos = load_images("cifar10", data, source)
    begin, end = round(low * len(photos)), round(high * len(photos))
    pixels, labels = photos.inputs[begin:end], photos.labels[begin:end].tolist()
    by_class: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        by_class.setdefault(label, []).append(i)
    dice = random.Random(seed)
    count = most if count is None else min(count, most)
    images = torch.full((count, 3, 2 * SIDE, 2 * SIDE), GREY, dtype=torch.uint8)
    captions = []
    for i in range(count):
        cells = sorted(dice.sample(range(CELLS), dice.randint(2, CELLS)))
        classes = dice.sample(range(len(NAMES)), len(cells))
        for cell, label in zip(cells, classes, strict=True):
            y, x = SIDE * (cell // 2), SIDE * (cell % 2)
            images[i, :, y : y + SIDE, x : x + SIDE] = pixels[dice.choice(by_class[label])]
        objects = [(cell, NAMES[label]) for cell, label in zip(cells, classes, strict=True)]
        captions.append([caption(objects, dice) for _ in range(REFERENCES)])
    return Scenes(images, captions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--count", type=int, default=8)
    options = parser.parse_args()
    from PIL import Image

    options.out.mkdir(parents=True, exist_ok=True)
    made = scenes(options.split, options.data, options.count)
    for i, (image, said) in enumerate(zip(made.images, made.captions, strict=True)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(options.out / f"{options.split}-{i}.png")
        print(f"{options.split}-{i}.png: {' | '.join(said)}")


if __name__ == "__main__":
    main()
