"""What a training will take, told before it begins: three steps are run and thrown away."""

import time
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import nn

from offramp.graph import eval_mode
from offramp.loaders import as_loader
from offramp.meter import duration
from offramp.objectives import DepthWeighted, FinalOnly, Objective, TwoStage
from offramp.recipe import Recipe
from offramp.record import to_device

__all__ = ["Estimate", "estimate"]

STATES = {"adamw": 2, "sgd": 1}  # tensors that the optimizer keeps for each weight
STEPS = 3  # of which the first warms up and counts memory
UPDATE = 1.1  # a step with the optimizer, in times of forward and backward


@dataclass(frozen=True)
class Estimate:
    """Steps of a training, seconds of all of them, and bytes of weights, gradients, optimizer and activations."""

    steps: int
    seconds: float
    bytes: int

    def __str__(self) -> str:
        return f"{self.steps} steps, about {duration(self.seconds)}, {self.bytes / 2**20:.0f} MiB beside the data"


def estimate(
    model: nn.Module,
    data: Any,
    *,
    objective: Objective = DepthWeighted(),  # noqa: B008  frozen values
    recipe: Recipe = Recipe(),  # noqa: B008
) -> Estimate:
    """What `train` with these arguments will take, from a few forward and backward passes where it will train.

    The model is left as it was: it runs in eval mode, and its gradients are removed. Later batches may be shorter or
    longer, so this is a guess, within about a factor of two; the training itself says how much is left.
    """
    loader = as_loader(data, recipe.batch_size, shuffle=True, seed=recipe.seed, bucket=recipe.bucket)
    home = next(model.parameters()).device
    device = torch.device("cuda") if torch.cuda.is_available() else home  # as `train` does
    loss = objective.first if isinstance(objective, TwoStage) else objective
    saved, took = 0, list[float]()
    try:
        model.to(device)
        with eval_mode(model), torch.enable_grad():
            for batch in islice(loader, STEPS):
                inputs, labels = to_device(batch.inputs, device), batch.labels.to(device)  # type: ignore[union-attr]
                began = time.perf_counter()
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                    saved = max(saved, _step(model, inputs, labels, loss, first=not took))
                took.append(time.perf_counter() - began)
    finally:
        model.zero_grad(set_to_none=True)
        model.to(home)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    steps = len(loader) * recipe.epochs
    step_s = median(took[1:] or took) * UPDATE
    activations = max(0, saved - weights)
    return Estimate(steps, steps * step_s, weights + trained * (1 + STATES[recipe.optimizer]) + activations)


def _step(model: nn.Module, inputs: Any, labels: torch.Tensor, loss: Objective, *, first: bool) -> int:
    """Bytes that the backward pass needs, weights among them, after it was run; only the first step counts them."""
    sizes: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    if first:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            logits = model(inputs)
    else:
        logits = model(inputs)
    value = _loss(loss, logits, labels)
    value.backward()
    float(value.detach())  # waits for a GPU
    return sum(sizes.values())


def _loss(objective: Objective, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A loss of the same cost as the objective's own: that of all exits, or of the last."""
    used = logits[-1:] if isinstance(objective, FinalOnly) else logits
    flat = used.reshape(-1, used.shape[-1]).float()
    return nn.functional.cross_entropy(flat, labels.repeat(used.shape[0]))
