"""A network of EENet's image tables with its exits, trained on CIFAR-10 by EENet's recipe, shortened to fit.

    python -m experiments.eenet.train resnet56 --data DIR       # bottlenecks, heads of three convolutions; 30 epochs
    python -m experiments.eenet.train basic --data DIR          # the usual ResNet-56 with light heads
    python -m experiments.eenet.train tuned --data DIR          # the same, begun with the public weights; 8 epochs
    python -m experiments.eenet.train densenet121 --data DIR --epochs 1 --limit 2000       # where there is no GPU

EENet trains 150 epochs. Weights go to runs/eenet/NETWORK-SEED/, what the exits said of the test rows to
results/eenet/NETWORK-SEED.safetensors, with costs and how it was trained; with --limit only what came of it, to
results/eenet/check-NETWORK.json. It says what it will take
before it begins. Given again after a stop, it goes on.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from experiments.eenet.networks import EXITS, MSDHead, MSDNet, densenet121, public_resnet56, resnet_bottleneck
from safetensors.torch import save_file

from offramp import EENetLoss, MapHead, Recipe, attach, measure, record, train
from offramp.artefacts import write_atomically, write_json
from offramp.augment import CropFlip
from offramp.checkpoints import named_tensors
from offramp.demo import resnet56
from offramp.estimate import estimate
from offramp.machine import fast_precision, machine_line, versions
from offramp.tasks import load_images

#: Behind blocks 9, 12, 15 and 18 of 27: the first and the last of these are EENet's; costs of about 33, 45, 56, 67 %.
BASIC = ("layer1", "layer2.2", "layer2.5", "layer2.8")
NETWORKS = ("resnet56", "basic", "tuned", "densenet121", "msdnet")


def network_of(name: str, seed: int, data: Path) -> Any:
    """The network with its exits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        example = torch.zeros(2, 3, 32, 32)
        if name in ("basic", "tuned"):
            network = resnet56(seed=seed) if name == "basic" else public_resnet56(data)
            return attach(network, at=BASIC, head=MapHead(grid=4), example=example)
        if name == "resnet56":
            return attach(resnet_bottleneck(), at=EXITS[name], head=MapHead(convs=3, divide=4), example=example)
        if name == "densenet121":
            return attach(densenet121(), at=EXITS[name], head=MapHead(convs=3), example=example)
        return attach(MSDNet(10), at=EXITS[name], head=_msd_head, example=example)


def _msd_head(shape: tuple[int, ...], classes: int) -> MSDHead:
    return MSDHead(shape[1], classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/eenet"))
    parser.add_argument("--results", type=Path, default=Path("results/eenet"))
    parser.add_argument("--epochs", type=int, default=None, help="30; 8 for tuned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=None, help="training images, by seed")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--dry-run", action="store_true", help="say what it takes and train nothing")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    part = "" if options.limit is None else f"-of-{options.limit}"
    folder = options.runs / f"{options.network}-{options.seed}{part}"
    model = network_of(options.network, options.seed, options.data)
    tuned = options.network == "tuned"
    normalise = "imagenet" if tuned else "cifar"
    rows, test = (load_images("cifar10", options.data, split, normalise=normalise) for split in ("train", "test"))
    if options.limit is not None:
        picked = torch.randperm(len(rows), generator=torch.Generator().manual_seed(options.seed))[: options.limit]
        rows = rows.select(picked)
    recipe = Recipe(
        epochs=options.epochs or (8 if tuned else 30), batch_size=128, lr=0.02 if tuned else 0.1, optimizer="sgd",
        weight_decay=5e-4, schedule="cosine" if tuned else "step", warmup=0.0,
        clip_norm=None, precision=fast_precision(), channels_last=True, augment=CropFlip(), seed=options.seed,
    )  # fmt: skip
    print(f"{options.network}: {estimate(model, rows, objective=EENetLoss(), recipe=recipe)}", flush=True)
    if options.dry_run:
        return
    report = train(model, rows, objective=EENetLoss(), recipe=recipe, checkpoint=folder / "checkpoint")
    tensors = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in named_tensors(model)
    }
    write_atomically(folder / "model.safetensors", lambda path: save_file(tensors, path))
    trace = record(model, test, batch_size=250)
    trace.save(folder / "trace.safetensors", half=True)
    costs = measure(model, torch.zeros(2, 3, 32, 32), batch_sizes=())
    value = {
        "network": options.network, "seed": options.seed, "rows": len(rows), "accuracy": trace.accuracy(),
        "recipe": recipe.describe(), "report": report.to_dict(), "threads": torch.get_num_threads(),
        "machine": machine_line(), "versions": versions(),
        "data": {"train": rows.fingerprint(), "test": test.fingerprint()},
    }  # fmt: skip
    write_json(folder / "cell.json", value)
    if options.limit is not None:
        write_json(options.results / f"check-{options.network}.json", {**value, "cumulative": costs.cumulative()})
    else:
        kept = options.results / f"{options.network}-{options.seed}"
        replace(trace, ids=None).save(kept.with_suffix(".safetensors"), half=True)
        costs.save(f"{kept}-costs.json")
        write_json(kept.with_suffix(".json"), value)
    print(json.dumps(value["accuracy"]))


if __name__ == "__main__":
    main()
