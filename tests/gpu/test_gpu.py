"""On a GPU rows leave where they leave on the CPU, and the host waits once for an exit, not once for a row."""

import copy

import pytest
import torch
from torch import nn

import offramp
from offramp.demo import resnet20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def made(device: str):
    """The same network on a device, its rows, and a policy whose thresholds no row is near."""
    torch.manual_seed(0)
    network = resnet20(classes=5, ch_in=1, seed=3)
    model = offramp.attach(network, at=("layer1", "layer2"), example=torch.randn(3, 1, 16, 16))
    model.eval()
    rows = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        surest = torch.softmax(model(rows), -1).amax(-1).sort(dim=1).values
    policy = offramp.MaxProb(tuple(((surest[:, 30] + surest[:, 31]) / 2).tolist()))
    return copy.deepcopy(model).to(device), rows.to(device), policy


def test_exits_are_those_of_the_cpu():
    (here, rows, policy), (there, moved, _) = made("cpu"), made("cuda")
    ours, theirs = offramp.Runtime(there, policy)(moved), offramp.Runtime(here, policy)(rows)
    near = (theirs.score - torch.tensor(policy.thresholds)[theirs.exit]).abs() < 1e-3  # TF32 is off, kernels differ
    assert torch.equal(ours.exit.cpu()[~near], theirs.exit[~near])
    assert len(ours.exit.unique()) > 1
    torch.testing.assert_close(ours.probabilities.cpu()[~near], theirs.probabilities[~near], rtol=1e-3, atol=1e-4)
    assert ours.exit.device.type == "cuda"


@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_engines_on_the_gpu(engine, precision):
    model, rows, policy = made("cuda")
    run = offramp.Runtime(model, policy, engine, precision=precision, calibrated=precision)
    logits, _ = run.engine.says(rows)
    tolerance = 1e-3 if precision == "fp32" else 0.1
    torch.testing.assert_close(logits, model(rows).detach().float(), rtol=tolerance, atol=tolerance)
    for size in (1, 2, 7, 64):
        found = run(rows[:size])
        assert found.exit.shape == (size,)
        assert torch.isfinite(found.probabilities).all()


def test_the_host_waits_once_an_exit():
    model, rows, _ = made("cuda")
    run = offramp.Runtime(model, offramp.MaxProb(2.0))  # nobody leaves
    run(rows)
    waits = {}
    for size in (2, 64):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run(rows[:size])
        waits[size] = sum(event.count for event in profile.key_averages() if event.key == "aten::_local_scalar_dense")
    assert waits[2] == waits[64] <= model.exits + 1


def test_times_wait_for_the_device():
    layers = [nn.Linear(1024, 1024) for _ in range(3)]
    model = offramp.attach(
        nn.Sequential(*layers, nn.Linear(1024, 4)).cuda(), at=("0", "1"), example=torch.randn(3, 1024).cuda()
    )
    costs = offramp.measure(model, torch.randn(64, 1024).cuda(), batch_sizes=(1, 64), rounds=5, seconds=0.2)
    assert all(min(row.stage_s) > 0 for row in costs.timed)
    assert "cuda" in str(next(model.parameters()).device)
