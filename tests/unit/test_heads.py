"""Heads: what each computes, which one is chosen, and what is refused."""

import pytest
import torch
from torch import nn

from offramp.errors import NoSuchModule, ShapeError, ValueRangeError
from offramp.heads import MapHead, TokenHead, VectorHead, auto_head, build_heads

PLAIN = nn.Linear(1, 1)


def test_a_map_is_averaged_over_its_places() -> None:
    head = MapHead().build((1, 6, 4, 4), 3, PLAIN)
    x = torch.randn(5, 6, 4, 4)
    assert torch.allclose(head(x), head.linear(x.flatten(2).mean(2)), atol=1e-6)


def test_a_grid_keeps_where_things_are() -> None:
    head = MapHead(grid=2).build((1, 6, 4, 4), 3, PLAIN)
    x = torch.randn(5, 6, 4, 4)
    patches = torch.stack([x[:, :, :2, :2], x[:, :, :2, 2:], x[:, :, 2:, :2], x[:, :, 2:, 2:]], 2).mean((3, 4))
    assert torch.allclose(head(x), head.linear(patches.flatten(1)), atol=1e-6)


def test_convolutions_divide_the_channels_once() -> None:
    head = MapHead(convs=3, divide=4).build((1, 16, 8, 8), 3, PLAIN)
    assert [tuple(p.shape[:2]) for p in head.convs.parameters() if p.ndim == 4] == [(4, 16), (4, 4), (4, 4)]
    assert head(torch.randn(2, 16, 8, 8)).shape == (2, 3)
    assert MapHead(convs=1, divide=4).build((1, 2, 8, 8), 3, PLAIN)(torch.randn(2, 2, 8, 8)).shape == (2, 3)


def test_attention_begins_as_the_mean_and_then_follows_its_query() -> None:
    head = TokenHead("attention").build((1, 4, 6), 3, PLAIN)
    mean = TokenHead("mean").build((1, 4, 6), 3, PLAIN)
    mean.linear = head.linear
    x, mask = torch.randn(2, 4, 6), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(head(x, mask), mean(x, mask))
    torch.testing.assert_close(head(x), mean(x))
    with torch.no_grad():
        head.query.copy_(torch.randn(6) * 3)
    scores = (x @ head.query) / 6**0.5
    rows = []
    for row, kept in zip(range(2), (2, 4), strict=True):
        weights = torch.softmax(scores[row, :kept], 0)
        rows.append((weights[:, None] * x[row, :kept]).sum(0))
    torch.testing.assert_close(head(x, mask), head.linear(torch.stack(rows)))
    assert not torch.allclose(head(x, mask), mean(x, mask), atol=1e-3)
    with pytest.raises(ShapeError, match="attention mask has shape"):
        head(x, mask[:, :3])


def test_the_mean_counts_the_tokens_that_the_mask_keeps() -> None:
    head = TokenHead("mean").build((1, 4, 6), 3, PLAIN)
    x, mask = torch.randn(2, 4, 6), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    expected = torch.stack([x[0, :2].mean(0), x[1].mean(0)])
    assert torch.allclose(head(x, mask), head.linear(expected), atol=1e-6)
    assert torch.allclose(head(x), head.linear(x.mean(1)), atol=1e-6)
    assert torch.isfinite(head(x, torch.zeros_like(mask))).all()
    with pytest.raises(ShapeError, match="attention mask"):
        head(x, mask[:, :3])


def test_the_first_token_and_a_projection_of_its_own() -> None:
    x = torch.randn(2, 4, 6)
    first = TokenHead("first").build((1, 4, 6), 3, PLAIN)
    assert torch.equal(first(x), first.linear(x[:, 0]))
    own = TokenHead("mean", pooler="own").build((1, 4, 6), 3, PLAIN)
    assert torch.equal(own(x), own.linear(torch.tanh(own.own(x.mean(1)))))


class Pooler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(x[:, 0]))


def test_the_models_own_pooler_is_shared_not_copied() -> None:
    model = nn.ModuleDict({"body": nn.Identity(), "pooler": Pooler()})
    x = torch.randn(2, 4, 6)
    for name in (True, "pooler"):
        head = TokenHead("first", pooler=name).build((1, 4, 6), 3, model)
        assert set(head.state_dict()) == {"linear.weight", "linear.bias"}
        assert torch.equal(head(x), head.linear(model["pooler"](x)))
    with pytest.raises(NoSuchModule, match="0 modules called 'pooler'"):
        TokenHead("first", pooler=True).build((1, 4, 6), 3, PLAIN)
    with pytest.raises(NoSuchModule, match="'poler'"):
        TokenHead("first", pooler="poler").build((1, 4, 6), 3, model)


def test_auto_goes_by_the_shape_and_the_models_habit() -> None:
    assert auto_head((1, 3, 8, 8), PLAIN) == MapHead()
    assert auto_head((1, 8), PLAIN) == VectorHead()
    assert auto_head((1, 4, 6), PLAIN) == TokenHead("mean")
    assert auto_head((1, 4, 6), nn.ModuleDict({"pooler": Pooler()})) == TokenHead("first")
    assert auto_head((1, 4, 6), nn.ModuleDict({"pooler": nn.AdaptiveAvgPool1d(1)})) == TokenHead("mean")
    tokened = nn.Linear(1, 1)
    tokened.cls_token = nn.Parameter(torch.zeros(1, 1, 6))
    assert auto_head((1, 4, 6), tokened) == TokenHead("first")
    with pytest.raises(ShapeError, match="callable"):
        auto_head((1, 2, 3, 4, 5), PLAIN)


def test_a_wish_is_a_name_a_spec_a_module_a_callable_or_a_list_of_them() -> None:
    shapes = [(1, 6, 4, 4), (1, 4, 6), (1, 6)]
    one = nn.Linear(6, 3)
    heads = build_heads(["conv", TokenHead("mean"), one], shapes, 3, PLAIN)
    assert len(heads[0].convs) == 3
    assert heads[2] is one
    asked = []

    def make(shape: tuple[int, ...], classes: int) -> nn.Module:
        asked.append((shape, classes))
        return nn.Flatten()

    assert len(build_heads(make, shapes, 3, PLAIN)) == 3
    assert asked == [(shape, 3) for shape in shapes]
    assert len({id(head) for head in build_heads("vector", [(1, 6), (1, 6)], 3, PLAIN)}) == 2


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ("cnov", "'cnov' is not known"),
        (lambda shape, classes: 3, "expected an nn.Module"),
        (nn.Linear(6, 3), "share its weights"),
        (["auto"], "1 entries for 2 taps"),
    ],
)
def test_wishes_that_are_refused(wish, words: str) -> None:
    with pytest.raises(ValueRangeError, match=words):
        build_heads(wish, [(1, 6), (1, 6)], 3, PLAIN)


def test_specs_that_cannot_be() -> None:
    with pytest.raises(ValueRangeError):
        MapHead(divide=4)
    with pytest.raises(ValueRangeError):
        TokenHead("last")
    with pytest.raises(ValueRangeError):
        TokenHead("mean", pooler=True)
    with pytest.raises(ShapeError):
        VectorHead().build((1, 2, 3), 3, PLAIN)


def test_specs_are_values() -> None:
    assert MapHead(convs=3, divide=4) == eval(repr(MapHead(convs=3, divide=4)))
    assert hash(TokenHead()) == hash(TokenHead("first"))
