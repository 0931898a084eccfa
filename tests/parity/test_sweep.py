"""Many policies over one trace by shared walks: the same exits, answers, shares and costs as one simulation each."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import one_hot

from offramp.cost import CostModel
from offramp.errors import ShapeError
from offramp.policies import (
    BEEM,
    EERO,
    FAMILIES,
    FPABEE,
    JEIDNN,
    PCEE,
    ZTW,
    AccuracyBins,
    Array,
    BERxiT,
    EENet,
    Entropy,
    Fixed,
    Margin,
    MaxProb,
    MSDNet,
    Patience,
    Stopping,
    Voting,
)
from offramp.simulate import simulate, walk
from offramp.sweep import Sweep
from offramp.trace import ExitTrace

EXITS, CLASSES, ROWS = 5, 4, 200
OFF = (True, True, False, True, True)
COSTS = CostModel.from_costs((0.15, 0.3, 0.55, 0.8, 1.0))


@pytest.fixture(scope="module")
def trace() -> ExitTrace:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (ROWS,), generator=g)
    base = torch.randn(ROWS, CLASSES, generator=g) + one_hot(labels, CLASSES)
    logits = base + 0.5 * torch.randn(EXITS, ROWS, CLASSES, generator=g)
    return ExitTrace(logits, labels, torch.rand(EXITS, ROWS, 1, generator=g), ("certainty",))


def thresholded(flags):
    """One policy of every family that compares a score with thresholds, which are all 0.6."""
    g = torch.Generator().manual_seed(1)

    def array(*shape: int) -> Array:
        return Array(0.5 * torch.randn(shape, generator=g))

    def eenet(extra: int):
        before = [k if flags is None else sum(flags[:k]) for k in range(EXITS)]
        return tuple((Array(torch.rand(CLASSES + 2 + extra + n, generator=g) / 2),) for n in before)

    edges = ((0.3, 0.5, 0.7),) * EXITS
    nearly_own = Array(torch.eye(EXITS) - 0.1 * torch.ones(EXITS, EXITS).tril(-1))
    return [
        *(kind(0.6, enabled=flags) for kind in (MaxProb, MSDNet, EERO, Entropy, Margin, BERxiT, Voting)),
        Voting(0.6, 0.5, flags),
        BEEM((0.2, 0.4, 0.6, 0.8, 1.0), 0.6, "own", flags),
        BEEM((0.2, 0.4, 0.6, 0.8, 1.0), 0.6, "zero", flags),
        BEEM((1.0,) * EXITS, 0.6, "own", flags, "multilabel"),
        EENet(eenet(0), 0.6, "linear", True, flags),
        EENet(eenet(1), 0.6, "linear", True, flags, votes=True),
        ZTW(0.6, array(EXITS, EXITS), array(EXITS, CLASSES), None, flags),
        ZTW(0.6, array(EXITS, EXITS), array(EXITS, CLASSES), array(EXITS, CLASSES, CLASSES), flags),
        JEIDNN(array(EXITS, 5), 0.6, 0.5, flags),
        AccuracyBins(edges, ((0.1, 0.4, 0.6, 0.9),) * EXITS, 0.6, flags),
        Stopping(0.6, nearly_own, array(EXITS, CLASSES), None, flags),
        Stopping(0.6, nearly_own, array(EXITS, CLASSES), Array([[-0.3, 0.8, -0.4, 0.5]] * EXITS), flags),
    ]


def others(flags):
    """Policies whose rule is more than a comparison of a score with thresholds."""
    return [
        Patience(0, flags),
        Patience(2, flags),
        Patience(1, flags, "multilabel"),
        FPABEE(0.1, 1, "js", flags),
        FPABEE(0.3, 2, "kl", flags),
        FPABEE(0.3, 1, "js", flags, "multilabel"),
        PCEE(0.2, 1, flags),
        PCEE(0.2, 2, flags),
        Fixed(0, EXITS),
        Fixed(3, EXITS),
        Fixed(EXITS - 1, EXITS),
    ]


def moved(policy) -> list:
    """The policy with other thresholds, shared and one per exit; they come in no order."""
    apart = (0.9, 0.7, 0.5, 0.6, 0.0)
    return [replace(policy, thresholds=t) for t in (0.6, -1e3, 0.35, apart, 1e3, apart[::-1], 0.8)]


def assert_same(said, policy, trace) -> None:
    outcome = simulate(policy, trace, COSTS)
    assert torch.equal(said.exit, outcome.exit), policy
    assert torch.equal(said.said, outcome.answer.argmax(dim=-1)), policy
    assert said.shares == outcome.shares
    assert said.cost == pytest.approx(outcome.cost, rel=1e-12)


def test_every_family_is_here():
    assert {type(p).__name__ for p in thresholded(None) + others(None)} == set(FAMILIES)


@pytest.mark.parametrize("flags", [None, OFF, (False, True, True, False, False), (False,) * EXITS])
def test_one_sweep_for_every_policy_in_turn(trace, flags):
    sweep = Sweep(trace, COSTS)
    for policy in thresholded(flags):
        for one in moved(policy):
            assert_same(sweep(one), one, trace)
    for policy in others(flags):
        assert_same(sweep(policy), policy, trace)


def test_the_sweeps_above_use_every_exit_that_is_on(trace):
    for policy in thresholded(OFF):
        taken = {k for one in moved(policy) for k in simulate(one, trace, COSTS).exit.tolist()}
        assert taken == ({1, 3, 4} if isinstance(policy, Voting) else {0, 1, 3, 4}), policy


def test_alternating_between_families_and_flags(trace):
    """The walk that is kept is never one of another family, other parameters or other flags."""
    sweep = Sweep(trace, COSTS)
    lines = [moved(p) for pair in zip(thresholded(None), thresholded(OFF), strict=True) for p in pair]
    lines += [[p] * 7 for pair in zip(others(None), others(OFF), strict=True) for p in pair]
    for turn in zip(*lines, strict=True):
        for one in turn:
            assert_same(sweep(one), one, trace)


def test_what_was_said_stays_when_the_sweep_goes_on(trace):
    sweep = Sweep(trace, COSTS)
    first = sweep(MaxProb(0.6))
    kept = first.exit.clone(), first.said.clone()
    sweep(MaxProb(0.9))
    sweep(Entropy(0.1))
    assert torch.equal(first.exit, kept[0])
    assert torch.equal(first.said, kept[1])


def test_regression_and_one_exit():
    g = torch.Generator().manual_seed(3)
    numbers = ExitTrace(torch.randn(EXITS, 50, 1, generator=g))
    for policy in (BEEM((1.0,) * EXITS, 1.5, "zero", OFF, "regression", 0.7), Patience(1, OFF, "regression", 0.7)):
        assert_same(Sweep(numbers, COSTS)(policy), policy, numbers)
    alone, one = ExitTrace(torch.randn(1, 9, 3, generator=g)), CostModel.from_costs((1.0,))
    for policy in (MaxProb(0.1), Voting(0.1), Patience(0)):
        said = Sweep(alone, one)(policy)
        assert said.exit.tolist() == [0] * 9
        assert torch.equal(said.said, alone.logits[0].argmax(dim=-1))
        assert (said.shares, said.cost) == ((1.0,), 1.0)


def test_other_numbers_of_exits_are_refused_whatever_was_walked_before(trace):
    with pytest.raises(ShapeError, match="4 exits"):
        Sweep(trace, CostModel.from_costs((0.2, 0.5, 0.8, 1.0)))
    sweep = Sweep(trace, COSTS)
    sweep(MaxProb(0.6))
    with pytest.raises(ShapeError, match="4 entries, but there are 5 exits"):
        sweep(MaxProb((0.6,) * 4))


def test_scores_exactly_at_a_threshold_leave(trace):
    """Thresholds that are scores of the trace, as `calibrate` sets them."""
    sweep = Sweep(trace, COSTS)
    for policy in thresholded(OFF):
        at_scores = walk(policy, trace).score[:-1, :3].flatten().tolist()
        for threshold in at_scores:
            one = replace(policy, thresholds=threshold)
            assert_same(sweep(one), one, trace)
