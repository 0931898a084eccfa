"""Exits that cost more time than they save are switched off, and the plain model wins where it is faster."""

from dataclasses import replace

import pytest
import torch

from offramp import Budget, CostModel, ExitTrace, Fixed, MaxProb, calibrate, simulate
from offramp.cost import TimedCosts

EXITS = 4


@pytest.fixture(scope="module")
def trace():
    """Later exits are surer and more often right."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (400,), generator=generator)
    ease = 3 * torch.rand(400, generator=generator)
    truth = torch.nn.functional.one_hot(labels, 3) * ease[:, None]
    noise = torch.randn(EXITS, 400, 3, generator=generator)
    return ExitTrace(noise + torch.linspace(0.6, 2.0, EXITS)[:, None, None] * truth, labels)


def timed(head, step=0.0, regroup=0.0, sizes=(1, 64)):
    """Stages of 1 ms a row; the price of each exit as given, in ms a row."""
    rows = tuple(
        TimedCosts(
            n, 4e-3 * n, (1e-3 * n,) * EXITS, tuple(1e-3 * n * h for h in (*head, 0.0)), 1e-3 * step * n,
            regroup_s=(1e-3 * regroup * n,) * (EXITS - 1) + (0.0,),
        )
        for n in sizes
    )  # fmt: skip
    return replace(CostModel.from_costs((0.25, 0.5, 0.75, 1.0)), timed=rows)


def test_exits_that_cost_nothing_stay(trace):
    found = calibrate(MaxProb, trace, timed((0.0, 0.0, 0.0)), Budget(ms=2.5))
    assert found.policy.enabled is None or all(found.policy.enabled)
    assert found.status == "met"
    assert "switched off" not in found.message


def test_a_dear_head_is_switched_off_and_the_budget_still_met(trace):
    costs = timed((0.0, 3.0, 0.0))
    found = calibrate(MaxProb, trace, costs, Budget(ms=2.5))
    assert found.policy.enabled == (True, False, True, True)
    assert "Exit 1 switched off: it takes more time at batch 1 than it saves." in found.message
    assert found.status == "met"
    shares = simulate(found.policy, trace, costs).shares
    assert 1e3 * costs.seconds(shares, 1, found.policy.enabled) == pytest.approx(found.achieved)
    with_it = calibrate(MaxProb, trace, costs, Budget(ms=2.5), enabled=(True,) * EXITS)  # as asked for
    assert simulate(found.policy, trace, costs).accuracy > simulate(with_it.policy, trace, costs).accuracy


def test_what_an_exit_saves_counts_regrouping(trace):
    cheap = calibrate(MaxProb, trace, timed((0.0,) * 3, regroup=0.0), Budget(ms=40.0, batch_size=16))
    dear = calibrate(MaxProb, trace, timed((0.0,) * 3, regroup=3.0), Budget(ms=60.0, batch_size=16))
    assert "switched off" not in cheap.message
    assert "switched off" in dear.message


def test_the_plain_model_where_no_exit_pays(trace):
    found = calibrate(MaxProb, trace, timed((5.0, 5.0, 5.0)), Budget(ms=3.0))
    assert "the plain model is the better choice at batch 1: it takes 4 ms" in found.message
    assert found.status == "infeasible"
    assert found.policy.enabled == (False, False, False, True)
    assert found.achieved == pytest.approx(4.0)


def test_a_budget_above_the_plain_model_needs_no_exit(trace):
    found = calibrate(MaxProb, trace, timed((0.1, 0.1, 0.1)), Budget(ms=4.0))
    assert found.status == "met"
    assert set(simulate(found.policy, trace, timed((0.0,) * 3)).exit.tolist()) == {EXITS - 1}


def test_fewer_exits_answer_no_worse(trace):
    costs = timed((0.0, 0.0, 0.0))
    for target in (Budget(ms=2.5), Budget(fraction=0.6)):
        full, thin = calibrate(MaxProb, trace, costs, target), calibrate(MaxProb, trace, costs, target, thin=True)
        assert simulate(thin.policy, trace, costs).accuracy >= simulate(full.policy, trace, costs).accuracy
        assert thin.achieved <= target.amount * (1 + 1e-9)
        if thin.policy != full.policy:
            assert sum(thin.policy.enabled) < EXITS
            assert "switched off" in thin.message


def test_a_fixed_exit_is_nobody_elses_choice(trace):
    found = calibrate(Fixed, trace, timed((9.0, 9.0, 9.0)), Budget(ms=30.0))
    assert "switched off" not in found.message
