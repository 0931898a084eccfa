"""A small model with exits as a bundle."""

from pathlib import Path

import torch
from torch import nn

import offramp
from offramp.bundle import Bundle, Choice
from offramp.calibrate import calibrate
from offramp.preprocess import NumberPreprocess

LABELS = ("no", "perhaps", "yes")


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    block = [nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*block, nn.Linear(6, 3)).eval()


def bundle(seed: int = 0) -> Bundle:
    model = offramp.attach(network(seed), at=("0", "1"), example=torch.randn(2, 6)).eval()
    rows, labels = torch.randn(90, 6), torch.randint(3, (90,))
    trace = offramp.record(model, (rows, labels), progress=False)
    costs = offramp.CostModel.from_costs((0.4, 0.7, 1.0))
    policies = {}
    for fraction in (0.5, 0.8):
        found = calibrate(offramp.MaxProb, trace, costs, offramp.Budget(fraction=fraction))
        policies[f"max-prob-{fraction}"] = Choice(
            found.policy, found, offramp.simulate(found.policy, trace, costs).shares
        )
    names = tuple(f"c{i}" for i in range(6))
    return Bundle(
        model,
        labels=LABELS,
        policies=policies,
        costs=costs,
        preprocess=NumberPreprocess(names, (0.0,) * 6, (1.0,) * 6),
        title="three blocks",
        about={"made": "by a test"},
    )


def saved(folder: Path, seed: int = 0) -> Path:
    return bundle(seed).save(folder / "small.offramp")
