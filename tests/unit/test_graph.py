"""The training flags of a model that runs in eval mode for a while."""

import pytest
from torch import nn

from offramp.graph import eval_mode


def made() -> nn.Module:
    """Three levels; one part is there twice."""
    inner = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout()))
    return nn.Sequential(inner, nn.Sequential(inner, nn.BatchNorm1d(2))).eval()


@pytest.mark.parametrize("which", range(7))
def test_any_one_part_that_trains_is_in_eval_mode_inside_and_trains_again_afterwards(which: int) -> None:
    model = made()
    parts = list(model.modules())
    parts[which].training = True
    with eval_mode(model):
        assert not any(part.training for part in parts)
    assert [part.training for part in parts] == [i == which for i in range(7)]


def test_the_flags_come_back_after_an_error() -> None:
    model = made().train()
    with pytest.raises(KeyError), eval_mode(model):
        raise KeyError
    assert all(part.training for part in model.modules())


def test_a_part_that_holds_the_whole_keeps_nobody_busy_for_ever() -> None:
    model = made()
    model[1].above = model
    with eval_mode(model):
        assert not model.training
