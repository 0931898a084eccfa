"""The estimate counts steps and memory, and leaves the model as it was."""

import copy

import pytest
import torch

from offramp.attach import attach
from offramp.demo import digits, resnet20
from offramp.estimate import estimate
from offramp.objectives import FinalOnly, TwoStage, Uniform
from offramp.recipe import Recipe


@pytest.mark.parametrize("objective", [Uniform(), FinalOnly(), TwoStage()])
def test_nothing_changes(objective) -> None:
    rows, _, _ = digits(size=16)
    rows = rows.select(range(70))
    model = attach(resnet20(ch_in=1), at=("layer1", "layer2"), example=rows.batch(torch.arange(2)).inputs).train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    found = estimate(model, rows, objective=objective, recipe=Recipe(epochs=3, batch_size=16))
    assert found.steps == 15
    assert found.seconds > 0
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # 16 rows of 16 x 16 x 16 floats are 256 KiB, and every convolution keeps at least its input
    assert found.bytes > 4 * weights + 10 * 16 * 16 * 16 * 16 * 4 / (1 if not isinstance(objective, FinalOnly) else 2)
    assert str(found).startswith("15 steps, about ")


def test_larger_batches_need_more() -> None:
    rows, _, _ = digits(size=16)
    model = attach(resnet20(ch_in=1), at="layer1", example=rows.batch(torch.arange(2)).inputs)
    small, large = (estimate(model, rows, recipe=Recipe(batch_size=size)).bytes for size in (8, 64))
    assert large > 3 * small
