"""CIFAR-10 exits on a frozen network: the public ResNet-56 weights, a convolutional head after each of its first two
block groups, six epochs of the heads alone, and a learned certainty. Writes the trace of the test rows and the costs.

    python -m experiments.ours.cifar10_frozen --data DIR --out runs/cifar10-frozen        # about 25 minutes on one core
"""

import argparse
import json
from pathlib import Path

import torch
from experiments.eenet.networks import public_resnet56

from offramp import DepthWeighted, MapHead, Recipe, attach, learn_certainty, measure, record, train
from offramp.augment import CropFlip
from offramp.tasks import load_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="holds cifar10/ and checkpoints/")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10-frozen"))
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = attach(
        public_resnet56(options.data), at=("layer1", "layer2"), head=MapHead(convs=3), example=torch.zeros(2, 3, 32, 32)
    )
    recipe = Recipe(
        epochs=options.epochs, batch_size=128, lr=5e-3, schedule="cosine", weight_decay=1e-2, channels_last=True,
        augment=CropFlip(), frozen="backbone", seed=0,
    )  # fmt: skip
    rows = load_images("cifar10", options.data, "train")
    report = train(
        model, rows, objective=DepthWeighted(), recipe=recipe,
        checkpoint=options.out / "checkpoint",
    )  # fmt: skip
    learn_certainty(model, rows, batch_size=256)
    record(model, load_images("cifar10", options.data, "test"), batch_size=250).save(options.out / "test.safetensors")
    measure(model, torch.zeros(2, 3, 32, 32)).save(options.out / "costs.json")
    (options.out / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")


if __name__ == "__main__":
    main()
