"""What stages and heads of a trained network take in ONNX Runtime at batch 1 and 32, for budgets in milliseconds.
Writes results/eenet/NAME-costs.json; the machine should be idle.

    python -m experiments.eenet.timed cifar10 --data DIR          # about a minute
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from experiments.beem.cells import VARIANTS, folder_of, rows_of
from experiments.beem.cells import network_of as text_network_of
from experiments.beem.run import PUT_ON
from experiments.eenet.networks import public_resnet56
from experiments.eenet.table import EXITS, IMAGES, RESULTS, source
from experiments.eenet.train import network_of
from safetensors.torch import load_file

from offramp import measure
from offramp.artefacts import write_json
from offramp.checkpoints import named_tensors
from offramp.inputs import Inputs
from offramp.machine import machine_line
from offramp.tasks import load_images


def opened(name: str, data: Path) -> tuple[Any, Inputs]:
    """(the trained network, 32 typical rows)."""
    if name in IMAGES:
        kind = IMAGES[name]
        model, rows = network_of(kind, 0, data), torch.randn(32, 3, 32, 32)
        folder = Path("runs/eenet") / f"{kind}-0"
    else:
        task = source(name)[2]["task"]
        model, tokenizer = text_network_of(task, VARIANTS[PUT_ON], 0)
        held_out = rows_of(task, data, tokenizer)[1]
        rows = held_out.batch((held_out.lengths - held_out.lengths.median()).abs().argsort()[:32]).inputs
        folder = folder_of(task, PUT_ON, 0, Path("runs/beem"))
    saved = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for tensor_name, tensor in named_tensors(model):
            tensor.copy_(saved[tensor_name])
    return model.eval(), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXITS)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, rows = opened(options.name, options.data)
    costs = measure(model, rows, batch_sizes=(1, 32), engine="onnx", seconds=5.0)
    for timed in costs.timed:
        stages = " ".join(f"{1000 * s:.2f}" for s in timed.stage_s)
        print(f"batch {timed.batch_size}: plain {1000 * timed.plain_s:.2f} ms, stages {stages} ms")
    print(f"wrote {costs.save(RESULTS / f'{options.name}-costs.json')}")
    if options.name == "cifar10-tuned":
        found = {"accuracy": right(public_resnet56(options.data).eval(), options.data), "machine": machine_line()}
        print(f"wrote {write_json(RESULTS / f'{options.name}-plain.json', found)}")


def right(network: Any, data: Path) -> float:
    """The accuracy of a network on CIFAR-10's test images."""
    test, found = load_images("cifar10", data, "test", normalise="imagenet"), 0
    with torch.inference_mode():
        for rows in torch.arange(len(test)).split(250):
            batch = test.batch(rows)
            found += int((network(batch.inputs).argmax(-1) == batch.labels).sum())
    return found / len(test)


if __name__ == "__main__":
    main()
