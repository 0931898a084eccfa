"""One step, two drivers: the live runtime leaves at the simulator's exits, for every policy and batch size."""

import pytest
import torch
from many_policies import CLASSES, COSTS, NAMES, ONE_EXIT, ROWS, near_rounding, policies
from torch import nn

import offramp
from offramp.demo import resnet20
from offramp.policies import (
    Evidence,
)


@pytest.mark.parametrize("size", [1, 2, 7, 61])
@pytest.mark.parametrize("name", NAMES)
def test_live_exits_are_the_simulated_ones(model, rows, trace, name, size):
    policy = policies(trace)[name]
    outcome = offramp.simulate(policy, trace, COSTS)
    near = near_rounding(policy, trace, outcome)
    assert near.sum() <= 2
    run = offramp.Runtime(model, policy)
    parts = [run(rows[i : i + size]) for i in range(0, ROWS, size)]
    exits = torch.cat([p.exit for p in parts])
    assert torch.equal(exits[~near], outcome.exit[~near])
    same = exits == outcome.exit
    probabilities = torch.cat([p.probabilities for p in parts])
    torch.testing.assert_close(probabilities[same], torch.softmax(outcome.answer, -1)[same], rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat([p.label for p in parts]), probabilities.argmax(-1))
    torch.testing.assert_close(torch.cat([p.score for p in parts])[same], outcome.score[same], rtol=1e-4, atol=1e-4)


def test_the_policies_above_use_several_exits(trace):
    made = policies(trace)
    assert tuple(made) == NAMES
    for name, policy in made.items():
        used = len(offramp.simulate(policy, trace, COSTS).exit.unique())
        assert used == 1 if name in ONE_EXIT else used >= 2, name


def test_rows_leave_one_by_one_and_not_as_a_batch(model, rows, trace):
    """A single `.all()` over the batch would let a row wait for its neighbours."""
    policy = policies(trace)["max-prob"]
    alone = torch.cat([offramp.Runtime(model, policy)(rows[i : i + 1]).exit for i in range(ROWS)])
    together = offramp.Runtime(model, policy)(rows).exit
    assert len(together.unique()) > 1
    assert (alone == together).float().mean() > 0.95  # the rest lies within rounding of a threshold


def test_an_answer_does_not_depend_on_the_neighbours(model, rows, trace):
    policy = policies(trace)["beem"]
    run = offramp.Runtime(model, policy)
    whole = run(rows)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(4))
    shuffled = run(rows[order])
    torch.testing.assert_close(shuffled.probabilities, whole.probabilities[order], rtol=1e-4, atol=1e-5)


def test_heads_of_exits_that_are_off_do_not_run(model, rows):
    class Bomb(nn.Module):
        def forward(self, *_):
            raise AssertionError("this head is switched off")

    kept = model.heads[1]
    model.heads[1] = Bomb()
    try:
        prediction = offramp.Runtime(model, offramp.MaxProb(1.1, enabled=(True, False, True, True)))(rows)
        assert (prediction.exit == 3).all()
        with pytest.raises(AssertionError, match="switched off"):
            offramp.Runtime(model, offramp.MaxProb(1.1))(rows)
    finally:
        model.heads[1] = kept


def test_an_exit_that_is_off_does_not_fire_at_score_one(model):
    policy = offramp.MaxProb(1.0, enabled=(False, True, True, True))
    certain = Evidence(torch.tensor([[200.0, 0.0, 0.0, 0.0, 0.0]]))
    assert not policy.step(0, certain, ()).stop.any()
    assert policy.step(1, certain, ()).stop.all()


def test_no_rows_give_no_answers(model):
    prediction = offramp.Runtime(model, offramp.MaxProb(0.5))(torch.zeros(0, 1, 16, 16))
    assert prediction.label.shape == (0,)
    assert prediction.probabilities.shape == (0, CLASSES)


def test_nan_rows_are_named(model, rows):
    bad = rows.clone()
    bad[[3, 8]] = float("nan")
    with pytest.raises(offramp.ValueRangeError, match=r"rows \[3, 8\]"):
        offramp.Runtime(model, offramp.MaxProb(0.5))(bad)


def test_a_policy_for_other_exits_is_refused(model):
    with pytest.raises(offramp.ShapeError, match="3 entries, but there are 4 exits"):
        offramp.Runtime(model, offramp.MaxProb((0.5, 0.5, 0.5)))


def test_weights_changed_after_attaching_are_used(model, rows, trace):
    run = offramp.Runtime(model, offramp.MaxProb(2.0))
    before = run(rows[:5]).probabilities
    kept = model.backbone.linear
    try:
        model.backbone.linear = nn.Linear(64, CLASSES)  # replaced, not updated in place
        after = run(rows[:5]).probabilities
        with torch.inference_mode():
            torch.testing.assert_close(after, torch.softmax(model.plain(rows[:5]), -1), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before, after)
        model.double()
        assert run(rows[:5].double()).probabilities.shape == (5, CLASSES)
    finally:
        model.backbone.linear = kept
        model.float()


def test_bf16_stages_answer_in_float32(model, rows, trace):
    try:
        run = offramp.Runtime(model.bfloat16(), policies(trace)["max-prob"])
        prediction = run(rows.bfloat16())
        assert prediction.probabilities.dtype == torch.float32
        assert prediction.score.dtype == torch.float32
        assert len(prediction.exit.unique()) > 1
    finally:
        model.float()


def test_heads_run_in_eval_mode_whatever_the_flag():
    """BatchNorm in a head in training mode would mix rows and move its statistics."""
    torch.manual_seed(0)
    images = torch.randn(9, 1, 16, 16)
    made = offramp.attach(resnet20(ch_in=1), at=("layer1", "layer2"), head="conv", example=images[:2])
    run = offramp.Runtime(made.eval(), offramp.MaxProb(0.2))
    expected, state = run(images), {k: v.clone() for k, v in made.state_dict().items()}
    made.train()
    found = run(images)
    assert torch.equal(found.probabilities, expected.probabilities)
    assert made.heads.training
    assert made.backbone.training
    assert all(torch.equal(v, state[k]) for k, v in made.state_dict().items())


def test_threads_may_share_a_runtime(model, rows, trace):
    from concurrent.futures import ThreadPoolExecutor

    run = offramp.Runtime(model, policies(trace)["beem"])
    expected = run(rows).exit
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: run(rows).exit, range(12)))
    assert all(torch.equal(f, expected) for f in found)
