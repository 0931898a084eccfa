"""The image networks of EENet's tables: its bottleneck ResNet, DenseNet-121 for small images, and MSDNet.

Source: EENet (Ilhan et al. 2024) for sizes and places of exits; ResNet (He et al. 2016, section 4.2), DenseNet (Huang
et al. 2017, section 3) and MSDNet (Huang et al. 2018, section 4) for the networks. Written from the papers.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.demo import resnet56

__all__ = [
    "EXITS", "DenseNet", "MSDHead", "MSDNet", "densenet121", "msdnet", "public_resnet56", "resnet_bottleneck",
]  # fmt: skip


def _conv(before: int, after: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, projected where the shape changes."""

    expansion = 4

    def __init__(self, before: int, planes: int, stride: int) -> None:
        super().__init__()
        after = planes * self.expansion
        self.conv1, self.bn1 = _conv(before, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = _conv(planes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = _conv(planes, after, 1), nn.BatchNorm2d(after)
        same = stride == 1 and before == after
        self.shortcut = None if same else nn.Sequential(_conv(before, after, 1, stride), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class BottleneckResNet(nn.Module):
    """Three groups of bottlenecks with 16, 32 and 64 planes, times four, behind one 3x3 convolution."""

    def __init__(self, blocks: Sequence[int], classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 16), nn.BatchNorm2d(16)
        before = 16
        for i, (count, planes) in enumerate(zip(blocks, (16, 32, 64), strict=True)):
            made = []
            for j in range(count):
                made.append(Bottleneck(before, planes, 2 if i and not j else 1))
                before = planes * Bottleneck.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*made))
        self.linear = nn.Linear(before, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class DenseLayer(nn.Module):
    """What a dense block adds: BN-ReLU-1x1, BN-ReLU-3x3, `growth` new channels behind those that were there."""

    def __init__(self, before: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(before), _conv(before, 4 * growth, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), _conv(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat([x, new], 1)


class Transition(nn.Module):
    """Half the channels, half the side."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(before), _conv(before, before // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """Dense blocks `block1` to `block4` for 32x32 images: a 3x3 convolution in front and no early pooling."""

    def __init__(self, blocks: Sequence[int], growth: int, classes: int) -> None:
        super().__init__()
        width = 2 * growth
        self.conv = _conv(3, width)
        for i, count in enumerate(blocks):
            self.add_module(
                f"block{i + 1}", nn.Sequential(*[DenseLayer(width + j * growth, growth) for j in range(count)])
            )
            width += count * growth
            if i < len(blocks) - 1:
                self.add_module(f"transition{i + 1}", Transition(width))
                width //= 2
        self.bn, self.linear = nn.BatchNorm2d(width), nn.Linear(width, classes)
        self.blocks = len(blocks)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for i in range(1, self.blocks + 1):
            x = getattr(self, f"block{i}")(x)
            if i < self.blocks:
                x = getattr(self, f"transition{i}")(x)
        return self.linear(F.relu(self.bn(x)).mean((2, 3)))


class _New(nn.Module):
    """BN-ReLU-1x1, BN-ReLU-3x3 to `growth` channels, with a stride where a finer scale feeds a coarser one."""

    def __init__(self, before: int, growth: int, factor: int, stride: int) -> None:
        super().__init__()
        inner = min(before, factor * growth)
        self.bn1, self.conv1 = nn.BatchNorm2d(before), _conv(before, inner, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(inner), _conv(inner, growth, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class _Layer(nn.Module):
    """One layer at all scales that are left: each scale grows by what it and the next finer one give.

    Half of the new channels of a scale come from the finer scale and half from itself; the finest that is left has only
    itself, unless a finer one ends here.
    """

    def __init__(self, widths: Sequence[int], growth: int, factors: Sequence[int], drops: bool) -> None:
        super().__init__()
        self.drops = drops  # the finest scale feeds the next one and goes on no further
        self.same, self.down = nn.ModuleDict(), nn.ModuleDict()
        first = len(factors) - len(widths)
        for i, width in enumerate(widths):
            scale = first + i
            if drops and i == 0:
                continue
            new = growth * factors[scale]
            share = new if i == 0 else new // 2
            self.same[str(i)] = _New(width, share, _bottleneck(scale), 1)
            if i:
                self.down[str(i)] = _New(widths[i - 1], new - share, _bottleneck(scale - 1), 2)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        out = []
        for i, x in enumerate(maps):
            if self.drops and i == 0:
                continue
            parts = [x, self.same[str(i)](x)]
            if i:
                parts.append(self.down[str(i)](maps[i - 1]))
            out.append(torch.cat(parts, 1))
        return out


def _bottleneck(scale: int) -> int:
    return (1, 2, 4, 4)[min(scale, 3)]


class _Halve(nn.Module):
    """Half the channels at every scale, after which a scale was left behind."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), _conv(w, w // 2, 1)) for w in widths)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [module(x) for module, x in zip(self.each, maps, strict=True)]


class _Coarsest(nn.Module):
    """The coarsest map, which exits read, as a module of its own so that it can be tapped."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class MSDNet(nn.Module):
    """A multi-scale dense network with a tap `tap1` ... for every exit.

    Args:
        classes: of the last classifier.
        exits: how many, the last one included.
        base: layers before the first exit.
        step: layers between exits.
        growth: new channels of the finest scale in a layer; scale s has `factors[s]` times as many.
        factors: one for each scale, the finest first.
        side: of the images; 32 keeps the finest scale at 32, larger ones begin with two strides.
    """

    def __init__(
        self, classes: int = 10, *, exits: int = 5, base: int = 4, step: int = 2, growth: int = 6,
        factors: Sequence[int] = (1, 2, 4), side: int = 32,
    ) -> None:  # fmt: skip
        super().__init__()
        count = len(factors)
        layers = base + (exits - 1) * step
        widths = [max(16, 2 * growth) * f for f in factors]
        stem = [_conv(3, widths[0])] if side <= 64 else [_conv(3, widths[0], 7, 2), nn.BatchNorm2d(widths[0]),
                                                         nn.ReLU(), nn.MaxPool2d(3, 2, 1)]  # fmt: skip
        self.stem = nn.Sequential(*stem)
        self.first = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(a), nn.ReLU(), _conv(a, b, 3, 2)) for a, b in pairwise(widths)
        )
        drops = {(i + 1) * layers // count for i in range(count - 1)}  # a scale ends after each such part
        self.layers, self.halves = nn.ModuleList(), nn.ModuleDict()
        for i in range(layers):
            dropping = i in drops
            self.layers.append(_Layer(widths, growth, factors, dropping))
            first = count - len(widths)
            widths = [w + growth * factors[first + j] for j, w in enumerate(widths)][1 if dropping else 0 :]
            if dropping:
                self.halves[str(i)] = _Halve(widths)
                widths = [w // 2 for w in widths]
            if i + 1 >= base and (i + 1 - base) % step == 0:
                self.add_module(f"tap{(i + 1 - base) // step + 1}", _Coarsest())
        self.base, self.step = base, step
        self.last = MSDHead(widths[-1], classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for module in self.first:
            maps.append(module(maps[-1]))
        tapped = maps[-1]
        for i, layer in enumerate(self.layers):
            maps = layer(maps)
            if str(i) in self.halves:
                maps = self.halves[str(i)](maps)
            if i + 1 >= self.base and (i + 1 - self.base) % self.step == 0:
                tapped = getattr(self, f"tap{(i + 1 - self.base) // self.step + 1}")(maps[-1])
        return self.last(tapped)


class MSDHead(nn.Module):
    """MSDNet's classifier: two 3x3 convolutions of stride 2 with 128 channels, average, linear."""

    def __init__(self, ch: int, classes: int, width: int = 128) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            _conv(ch, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(),
            _conv(width, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.linear = nn.Linear(width, classes)

    def forward(self, tap: Tensor) -> Tensor:
        return self.linear(self.convs(tap).mean((2, 3)))


def _initialise(module: nn.Module) -> None:
    for each in module.modules():
        if isinstance(each, nn.Conv2d):
            nn.init.kaiming_normal_(each.weight, mode="fan_out", nonlinearity="relu")


#: Where the exits of each network go.
EXITS = {
    "resnet56": ("layer1", "layer2"),
    "densenet121": ("block1", "block2", "block3"),
    "msdnet": ("tap1", "tap2", "tap3", "tap4"),
}


def resnet_bottleneck(classes: int = 10) -> BottleneckResNet:
    """EENet's ResNet-56: nine bottlenecks in each group; exits behind the ninth and the eighteenth."""
    return BottleneckResNet((9, 9, 9), classes)


def public_resnet56(data: Path) -> nn.Module:
    """The usual ResNet-56 (basic blocks) with the public CIFAR-10 weights in DATA/checkpoints, whose names carry
    "module."; its images are normalised by ImageNet's mean and deviation."""
    (weights,) = sorted((data / "checkpoints").glob("resnet56-*.th"))
    network = resnet56()
    found = torch.load(weights, weights_only=True, map_location="cpu")["state_dict"]
    network.load_state_dict({name.removeprefix("module."): value for name, value in found.items()}, strict=False)
    return network.eval()


def densenet121(classes: int = 10) -> DenseNet:
    """DenseNet-121 with growth 32 for 32x32 images; exits behind dense blocks 1 to 3."""
    return DenseNet((6, 12, 24, 16), 32, classes)


def msdnet(classes: int = 1000, side: int = 224) -> MSDNet:
    """MSDNet-35: four scales, five exits seven layers apart, growth 16."""
    return MSDNet(classes, exits=5, base=7, step=7, growth=16, factors=(1, 2, 4, 4), side=side)
