"""A small network with exits, for tests of training that need no `attach`."""

import torch
from torch import nn


class Tiny(nn.Module):
    """Three exits over a small network with dropout, BatchNorm and a layer that a head shares with it."""

    def __init__(self, classes=3, width=16):
        super().__init__()
        self.classes, self.exits = classes, 3
        self.backbone = nn.Sequential(
            nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, width), nn.ReLU()
        )
        self.backbone.append(nn.Linear(width, classes))
        shared = self.backbone[4]
        self.heads = nn.ModuleList(
            [nn.Sequential(shared, nn.Linear(width, classes)), nn.Sequential(nn.Linear(width, classes))]
        )

    def plain(self, inputs):
        return self.backbone(inputs)

    def forward(self, inputs):
        first = self.backbone[:4](inputs)
        second = self.backbone[4:6](first)
        return torch.stack([self.heads[0](first), self.heads[1](second), self.backbone[6](second)])


def made(seed=0, **kwargs):
    """A Tiny with weights by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tiny(**kwargs)


def rows(count=120, seed=0):
    """Points in three classes that a linear map tells apart."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    return x, (x @ torch.randn(8, 3, generator=torch.Generator().manual_seed(9))).argmax(1)
