"""A network whose rows leave at different exits, some rows, and what its exits say of them."""

import pytest
import torch
from many_policies import CLASSES, ROWS

import offramp
from offramp.demo import resnet20


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = resnet20(classes=CLASSES, ch_in=1, seed=3)
    made = offramp.attach(network, at=("layer1.1", "layer2", "layer3.0"), example=torch.randn(2, 1, 16, 16))
    made.eval()
    probe = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        seen = made(probe)
    for k, linear in enumerate([*(h.linear for h in made.heads), network.linear]):
        # centred logits of moderate spread, so that rows differ and really leave at different exits
        spread = seen[k].std(dim=0).mean() / 1.5
        linear.weight.data.div_(spread)
        linear.bias.data.sub_(seen[k].mean(dim=0)).div_(spread)
    return made


@pytest.fixture(scope="module")
def rows():
    return torch.randn(ROWS, 1, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trace(model, rows):
    with torch.inference_mode():
        return offramp.ExitTrace(logits=model(rows).clone())
