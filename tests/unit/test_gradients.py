"""How the gradients of several exits meet in the backbone."""

import pytest
import torch
from torch import nn

from offramp import Recipe, attach, train
from offramp.errors import ValueRangeError


def model():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    return attach(network, at=("0", "2"), example=torch.randn(3, 4))


X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))


def gradients(kind, weights=(1.0, 1.0, 1.0)):
    """The gradient of a weighted sum over exits at each linear layer of the backbone."""
    made = model()
    made.gradients = kind
    logits = made(X)
    sum(w * one.square().sum() for w, one in zip(weights, logits, strict=True)).backward()
    return [None if made.backbone[i].weight.grad is None else made.backbone[i].weight.grad for i in (0, 2, 4)], logits


@pytest.mark.parametrize("kind", ["equilibrium", "local", "detached"])
def test_answers_are_the_same(kind):
    assert torch.equal(gradients(kind)[1], gradients("sum")[1])


def test_equilibrium_gives_every_exit_behind_a_place_the_same_share():
    each = [gradients("sum", tuple(float(i == k) for i in range(3)))[0] for k in range(3)]
    (first, second, third), _ = gradients("equilibrium")
    torch.testing.assert_close(first, (each[0][0] + each[1][0] + each[2][0]) / 3)
    torch.testing.assert_close(second, (each[1][1] + each[2][1]) / 2)
    torch.testing.assert_close(third, each[2][2])


def test_local_gradients_end_at_the_exit_before():
    each = [gradients("sum", tuple(float(i == k) for i in range(3)))[0] for k in range(3)]
    for ours, theirs in zip(gradients("local")[0], (each[0][0], each[1][1], each[2][2]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_detached_heads_leave_the_backbone_to_the_last_exit():
    alone = gradients("sum", (0.0, 0.0, 1.0))[0]
    for ours, theirs in zip(gradients("detached")[0], alone, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_heads_learn_in_every_way():
    for kind in ("sum", "equilibrium", "local", "detached"):
        made = model()
        made.gradients = kind
        made(X).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.heads.parameters()), kind


def test_training_says_how_and_leaves_the_model_as_it_was():
    labels = torch.arange(7) % 3
    weights = {}
    for kind in ("sum", "equilibrium", "local", "detached"):
        made = model()
        train(made, (X, labels), recipe=Recipe(epochs=2, batch_size=4, lr=0.05, gradients=kind), progress=False)
        assert made.gradients == "sum"
        weights[kind] = made.backbone[0].weight.detach().clone()
    found = list(weights.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_rates_fall_towards_the_input():
    from offramp.learner import _backbone_rates

    made = model()
    rates = _backbone_rates(made, Recipe(lr=0.1, layer_decay=0.5))
    assert [rates[made.backbone[i].weight] for i in (0, 2, 4)] == pytest.approx([0.025, 0.05, 0.1])
    assert set(_backbone_rates(made, Recipe(lr=0.1)).values()) == {0.1}
    before = made.backbone[0].weight.detach().clone()
    labels = torch.arange(7) % 3
    train(made, (X, labels), recipe=Recipe(epochs=1, batch_size=7, lr=0.1, layer_decay=1e-6), progress=False)
    assert (made.backbone[0].weight - before).abs().max() < 1e-6
    assert made.backbone[4].weight.grad is None


@pytest.mark.parametrize("fields", [{"gradients": "none"}, {"layer_decay": 0.0}, {"layer_decay": 1.5}])
def test_values_that_cannot_be(fields):
    with pytest.raises(ValueRangeError, match=f"Recipe.{next(iter(fields))}"):
        Recipe(**fields)
