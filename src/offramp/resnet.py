"""The residual networks of the CIFAR experiments: basic blocks, shortcuts without parameters."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BasicBlock", "ResNet", "resnet20", "resnet56"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the map shrinks, the shortcut takes every other pixel and adds empty
    channels (option A of the paper)."""

    def __init__(self, ch_in: int, ch_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ch_in, ch_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(ch_out)
        self.conv2 = nn.Conv2d(ch_out, ch_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(ch_out)
        self.stride, self.added = stride, ch_out - ch_in

    def forward(self, x: Float[Tensor, "batch ch height width"]) -> Float[Tensor, "batch ch2 height2 width2"]:
        """The block's output map."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.added:
            half = self.added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.added - half))
        return F.relu(out + x)


class ResNet(nn.Module):
    """A ResNet of depth 6 blocks + 2 with 16, 32 and 64 channels in its three groups `layer1` to `layer3`.

    Args:
        blocks: in each group; 3 makes ResNet-20, 9 makes ResNet-56.
        classes: of the last layer, `linear`.
        ch_in: channels of the input image.

    Source: He et al. 2016, section 4.2. The names of parameters are those of the public CIFAR-10 weights.
    """

    def __init__(self, blocks: int, classes: int = 10, ch_in: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ch_in, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _group(16, 16, blocks, 1)
        self.layer2 = _group(16, 32, blocks, 2)
        self.layer3 = _group(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Float[Tensor, "batch ch height width"]) -> Float[Tensor, "batch cls"]:
        """Logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def _group(ch_in: int, ch_out: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(ch_in, ch_out, stride)
    return nn.Sequential(first, *[BasicBlock(ch_out, ch_out, 1) for _ in range(blocks - 1)])


def resnet20(classes: int = 10, ch_in: int = 3, *, seed: int | None = None) -> ResNet:
    """ResNet-20 with random weights, the same for the same seed."""
    return _seeded(3, classes, ch_in, seed)


def resnet56(classes: int = 10, ch_in: int = 3, *, seed: int | None = None) -> ResNet:
    """ResNet-56 with random weights, the same for the same seed."""
    return _seeded(9, classes, ch_in, seed)


def _seeded(blocks: int, classes: int, ch_in: int, seed: int | None) -> ResNet:
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return ResNet(blocks, classes, ch_in)
