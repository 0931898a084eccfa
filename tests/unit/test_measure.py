"""What a model costs: FLOPs that can be worked out by hand, and times that are of the right kind."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from offramp import MaxProb, Patience, ValueRangeError, VectorHead, attach, measure, record
from offramp.demo import digits, resnet20
from offramp.machine import alternate, machine_line
from offramp.timing import never, time_policies, with_step_times


@pytest.fixture(scope="module")
def model():
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    return attach(layers, at=("1", "3"), head=VectorHead(), example=torch.randn(2, 8))


def test_flops_are_those_worked_out_by_hand(model):
    costs = measure(model, torch.randn(5, 8), batch_sizes=())
    plain = 2 * (8 * 16 + 16 * 16 + 16 * 3)
    assert costs.plain_flops == plain
    assert costs.stage == pytest.approx((2 * 8 * 16 / plain, 2 * 16 * 16 / plain, 2 * 16 * 3 / plain))
    assert costs.head == pytest.approx((2 * 16 * 3 / plain, 2 * 16 * 3 / plain, 0.0))
    assert costs.cumulative((False, False, True))[-1] == pytest.approx(1.0)
    assert costs.timed == ()


def test_a_resnet_counts_its_convolutions():
    network = attach(resnet20(ch_in=1), at=("layer1", "layer2"), example=torch.zeros(2, 1, 32, 32))
    costs = measure(network, torch.zeros(3, 1, 32, 32), batch_sizes=())
    first = 2 * 32 * 32 * 9 * (1 * 16 + 6 * 16 * 16)
    second = 2 * 16 * 16 * 9 * (16 * 32 + 5 * 32 * 32)
    third = 2 * 8 * 8 * 9 * (32 * 64 + 5 * 64 * 64) + 2 * 64 * 10
    assert costs.plain_flops == first + second + third


def test_times_at_every_size_with_the_machine(model):
    costs = measure(model, torch.randn(2, 8), batch_sizes=(4, 1), rounds=3, seconds=0.1)
    assert [t.batch_size for t in costs.timed] == [1, 4]
    assert all(t.plain_s > 0 and min(t.stage_s) > 0 for t in costs.timed)
    assert all(t.head_s[-1] == 0.0 and t.head_s[0] > 0 for t in costs.timed)
    assert costs.machine == machine_line()


def test_the_training_flag_comes_back(model):
    model.train()
    measure(model, torch.randn(2, 8), batch_sizes=(1,), rounds=3, seconds=0.1)
    assert model.training
    assert model.backbone.training


def test_mistakes(model):
    with pytest.raises(ValueRangeError, match="at least one row"):
        measure(model, torch.randn(0, 8))
    with pytest.raises(ValueRangeError, match="sizes of at least 1"):
        measure(model, torch.randn(2, 8), batch_sizes=(0,))


def test_contenders_take_turns():
    calls: list[str] = []
    took = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, seconds=60.0)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b", "b", "a"]  # one unmeasured call each, then turn about
    assert took["a"].rounds == took["b"].rounds == 4


def test_live_speed_counts_the_rows_that_left(model):
    rows = torch.randn(12, 8)
    batches = [rows[:4], rows[4:8], rows[8:]]
    costs = measure(model, rows, batch_sizes=(1, 4), rounds=3, seconds=0.1)
    policies = {"at once": MaxProb(0.0), "never": never(MaxProb(0.0)), "patience": never(Patience(1))}
    speeds = {s.policy: s for s in time_policies(model, policies, batches, costs=costs, rounds=3, seconds=0.5)}
    assert speeds["at once"].shares == (1.0, 0.0, 0.0)
    assert speeds["never"].shares == speeds["patience"].shares == (0.0, 0.0, 1.0)
    for speed in speeds.values():
        assert speed.speedup == pytest.approx(speed.plain_ms / speed.policy_ms)
        assert speed.kept == pytest.approx(speed.speedup / speed.promise)
    # leaving at once promises more than staying: the same plain time over fewer stages
    assert speeds["at once"].promise > speeds["never"].promise


def test_step_times_are_added_at_every_size():
    train, fit, _ = digits(size=8)
    network = attach(resnet20(ch_in=1), at=("layer1", "layer2"), example=train.batch(torch.arange(2)).inputs)
    trace = record(network, fit.select(range(30)), progress=False)
    costs = measure(network, torch.randn(2, 1, 8, 8), batch_sizes=(1, 4), rounds=3, seconds=0.1)
    timed = with_step_times(costs, MaxProb(0.5), trace, seconds=0.05)
    assert all(t.step_s > 0 for t in timed.timed)
    free = replace(costs, timed=tuple(replace(t, step_s=0.0) for t in costs.timed))
    assert timed.seconds((0.0, 0.0, 1.0), 4) > free.seconds((0.0, 0.0, 1.0), 4)
