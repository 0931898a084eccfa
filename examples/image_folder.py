"""A folder of images, one folder for each class: a ResNet-20 with exits learns it.

python examples/image_folder.py pets/                (without a folder, handwritten digits are written as images)
"""

import sys
from pathlib import Path

import offramp
from offramp.own import Own, prepare


def small_folder(path: Path, rows: int = 300) -> Path:
    """The path, after handwritten digits from 0 to 4 were written below it as PNG."""
    from PIL import Image

    from offramp.demo import digits

    train, _, _ = digits(size=16)
    for row in range(len(train)):
        pixels, label = train[row]
        if int(label) < 5 and row < 2 * rows:
            file = path / str(int(label)) / f"{row}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            low, high = pixels.min(), pixels.max()
            Image.fromarray(((pixels[0] - low) / (high - low) * 255).byte().numpy()).save(file)
    return path


def main(folder: Path) -> None:
    """Nothing; what came of it is printed."""
    made = prepare(Own(data=str(folder), model="resnet20", image_size=(16, 16), grey=True, epochs=4, skip_bad=True))
    print(f"exits behind {', '.join(made.model.taps)}; classes {', '.join(made.own.classes)}")
    train, calibrate, test = (made.job.load(split, None) for split in made.job.splits)
    offramp.train(made.model, train, recipe=made.job.recipe, progress=False)
    costs = offramp.measure(made.model, made.model.example, batch_sizes=(1, 16), rounds=5)
    fit, unseen = (offramp.record(made.model, rows, progress=False) for rows in (calibrate, test))
    for row in offramp.compare(fit, unseen, costs, [offramp.Budget(fraction=0.6)], ["max-prob", "beem-a"]):
        print(f"{row.family}: {row.accuracy:.3f} ({row.low:.3f} to {row.high:.3f}) at {row.cost:.2f} of the cost")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else small_folder(Path.cwd() / "digits"))
