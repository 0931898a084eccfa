"""Blocks are found from the module tree and from what one forward does, for networks of every build."""

import pytest
import torch
import transformers as t
from torch import nn

from offramp.attach import attach
from offramp.demo import resnet20
from offramp.errors import ValueRangeError
from offramp.placement import find_blocks, place

TOKENS = {"input_ids": torch.arange(5, 17).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BERT = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 37,
    "max_position_embeddings": 64,
}  # fmt: skip


class Plain(nn.Module):
    """Layers by name, activations in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


class Parted(nn.Module):
    """Features and a classifier, both `nn.Sequential`: they are not the blocks."""

    def __init__(self) -> None:
        super().__init__()

        def conv(a, b):
            return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]

        self.features = nn.Sequential(*conv(3, 8), *conv(8, 8), nn.MaxPool2d(2), *conv(8, 16), *conv(16, 16))
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(16 * 256, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.classifier(self.features(x))


class Listed(nn.Module):
    """A list whose blocks run in another order than they stand in."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        for k in (2, 0, 3, 1):
            x = x + self.blocks[k](x).relu()
        return self.out(x)


def layers(path: str, count: int) -> tuple[str, ...]:
    return tuple(f"{path}.{k}" for k in range(count))


def cases():
    yield "resnet20", lambda: resnet20(), IMAGES, ("layer1", "layer2", "layer3")
    yield "bert", lambda: t.BertForSequenceClassification(t.BertConfig(**BERT)), TOKENS, layers("bert.encoder.layer", 4)
    yield (
        "distilbert",
        lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(vocab_size=99, dim=32, n_layers=3, n_heads=4, hidden_dim=37)
        ),
        TOKENS,
        layers("distilbert.transformer.layer", 3),
    )
    yield (
        "albert",
        lambda: t.AlbertForSequenceClassification(t.AlbertConfig(**BERT, embedding_size=16)),
        TOKENS,
        tuple(f"albert.encoder.albert_layer_groups.0@{k}" for k in range(4)),
    )
    yield (
        "swin",
        lambda: t.SwinForImageClassification(
            t.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[1, 2, 1], num_heads=[2] * 3, window_size=2)
        ),
        IMAGES,
        layers("swin.encoder.layers", 3),
    )
    yield (
        "convnext",
        lambda: t.ConvNextForImageClassification(
            t.ConvNextConfig(hidden_sizes=[10, 20, 30, 40], depths=[2, 2, 3, 2], image_size=32)
        ),
        IMAGES,
        layers("convnext.encoder.stages", 4),
    )
    yield (
        "sequential",
        lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
        torch.rand(2, 5),
        ("1", "3", "4"),
    )
    yield "plain", Plain, torch.rand(2, 5), ("fc1", "fc2", "fc3")
    parts = ("features.2", "features.6", "features.9", "features.12")
    yield "features and classifier", Parted, IMAGES, parts
    yield "listed", Listed, torch.rand(2, 8), ("blocks.2", "blocks.0", "blocks.3", "blocks.1")


@pytest.mark.parametrize(("name", "make", "example", "taps"), list(cases()), ids=[case[0] for case in cases()])
def test_blocks_in_the_order_of_execution(name, make, example, taps) -> None:
    model = make()
    found = find_blocks(model, example)
    assert found.taps == taps
    assert all(0 < a < b <= 1 for a, b in zip(found.done, found.done[1:], strict=False))
    placed = place(model, example)
    assert placed == taps[: len(placed)]
    assert taps[-1] not in placed  # the last exit is there already
    assert attach(model, at=placed, example=example).taps == placed
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_every_nth() -> None:
    model = t.BertForSequenceClassification(t.BertConfig(**BERT))
    assert place(model, TOKENS, every=2) == ("bert.encoder.layer.1",)
    assert place(model, TOKENS, every=3) == ("bert.encoder.layer.2",)
    with pytest.raises(ValueRangeError, match=r"4 blocks .BertLayer., so every=4 places no exit"):
        place(model, TOKENS, every=4)
    with pytest.raises(ValueRangeError, match="every is 0"):
        place(model, TOKENS, every=0)


def test_deep_networks_get_at_most_eleven_exits() -> None:
    deep = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(40)], nn.Linear(4, 2))
    placed = place(deep, torch.rand(2, 4))
    assert placed == tuple(str(k) for k in range(3, 39, 4))


def test_no_exit_where_nothing_is_left_to_save() -> None:
    wide = nn.Sequential(nn.Linear(4, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 2))
    assert place(wide, torch.rand(2, 4)) == ("1",)
    assert place(wide, torch.rand(2, 4), every=1) == ("1", "3")  # who asks gets it
    with pytest.raises(ValueRangeError, match="100 % of the work is done"):
        place(nn.Sequential(nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 2)), torch.rand(2, 400))


@pytest.mark.parametrize("model", [nn.Linear(5, 2), nn.Sequential(nn.Flatten(), nn.Linear(5, 2))])
def test_without_blocks_the_message_says_how_to_name_modules(model: nn.Module) -> None:
    with pytest.raises(ValueRangeError, match=r"no blocks that repeat.*--at NAME,NAME"):
        place(model, torch.rand(2, 5))


def test_query_key_and_value_are_not_blocks() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
            self.out = nn.Linear(4, 2)

        def forward(self, x):
            return self.out((self.q(x) * self.k(x)).softmax(-1) * self.v(x))

    with pytest.raises(ValueRangeError, match="no blocks"):
        find_blocks(One(), torch.rand(2, 4))


def test_the_model_is_left_in_its_mode() -> None:
    model = resnet20().train()
    before = model.bn1.running_mean.clone()
    place(model, IMAGES)
    assert model.training
    assert torch.equal(before, model.bn1.running_mean)
