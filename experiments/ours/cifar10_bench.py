"""What exits save in ResNet-56 on CIFAR-10, measured: the public weights, frozen, and two light heads (a linear layer
on 4 x 4 averages of the map), trained for two epochs. Writes results/engines-cifar10.json.

    python -m experiments.ours.cifar10_bench --data DIR         # heads about 10 minutes, once; then about 20 of timing

Policies are calibrated on 2,000 test images to the fraction, and judged on 2,000 others. The network was trained by
others on the training images, its heads here; no test image was seen by either.
"""

import argparse
from pathlib import Path

import torch
from experiments.eenet.networks import public_resnet56
from safetensors.torch import load_file, save_file

from offramp import MapHead, Recipe, attach, train
from offramp.artefacts import write_atomically
from offramp.bench import Plan, Subject, bench
from offramp.bench.apart import Opener
from offramp.bench.page import write_page
from offramp.checkpoints import named_tensors
from offramp.data import Examples
from offramp.splits import stratified_split
from offramp.tasks import load_images

ROWS = 2000
WEIGHTS = "model.safetensors"


def model_of(data: Path) -> torch.nn.Module:
    """ResNet-56 with light heads behind its first two groups, not trained yet."""
    torch.manual_seed(0)
    return attach(
        public_resnet56(data), at=("layer1", "layer2"), head=MapHead(grid=4), example=torch.zeros(2, 3, 32, 32)
    )


def heads_trained(data: Path, out: Path) -> None:
    """Nothing; the weights are in the folder."""
    model = model_of(data)
    recipe = Recipe(epochs=2, batch_size=128, lr=5e-3, schedule="cosine", frozen="backbone", seed=0)
    train(model, load_images("cifar10", data, "train"), recipe=recipe, checkpoint=out / "checkpoint")
    tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(model)}
    write_atomically(out / WEIGHTS, lambda path: save_file(tensors, path))


def subject(data: str, out: str) -> Subject:
    """The model, rows to calibrate on and rows to judge on; each engine's process opens it anew."""
    model = model_of(Path(data)).eval()
    saved = load_file(Path(out) / WEIGHTS)
    with torch.no_grad():
        for name, tensor in named_tensors(model):
            tensor.copy_(saved[name])
    rows: Examples = load_images("cifar10", data, "test")
    fit, test = (rows.select(part[:ROWS]) for part in stratified_split(rows.labels, (0.5, 0.5)))
    return Subject(model, test, fit, title="ResNet-56, CIFAR-10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds cifar10/ and checkpoints/")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10-light"))
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--engines", default="eager,onnx,onnx-file,compiled")
    parser.add_argument("--html", type=Path, default=None)
    options = parser.parse_args()
    if not (options.out / WEIGHTS).exists():
        heads_trained(options.data, options.out)
    opener = Opener(
        "experiments.ours.cifar10_bench:subject",
        {"data": str(options.data.resolve()), "out": str(options.out.resolve())},
    )
    plan = Plan(
        engines=options.engines.split(","), batch_sizes=(1, 64), policies=("max-prob", "beem-a"), fraction=0.65,
        seconds=options.seconds, threads=1,
    )  # fmt: skip
    found = bench(opener(), plan, opener=opener, out=Path("results") / "engines-cifar10.json")
    for cell in found.cells:
        print(
            f"{cell.name:15} {cell.policy:10} batch {cell.batch_size:3}: {cell.speedup:.2f}x of {cell.promise:.2f}x "
            f"({100 * cell.kept:.0f} %), right {100 * cell.accuracy.value:.1f} (plain "
            f"{100 * cell.plain_accuracy.value:.1f})"
        )
    if options.html is not None:
        write_page(found, options.html)


if __name__ == "__main__":
    main()
