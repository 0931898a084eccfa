import pytest
import torch

from offramp.cost import CostModel
from offramp.errors import ValueRangeError
from offramp.metrics import accuracy_interval, bootstrap_difference, near_decision
from offramp.policies import BEEM, MaxProb, Patience
from offramp.simulate import simulate
from offramp.trace import ExitTrace

COSTS = CostModel.from_costs((0.3, 0.6, 1.0))


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    # p ± roots of (p - x)^2 = z^2 x (1 - x) / n at z = 1.96, as tabulated (Newcombe 1998, method 3)
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson(right, rows, low, high):
    assert accuracy_interval(right, rows) == pytest.approx((low, high), abs=6e-5)
    # both ends solve the quadratic that defines them
    p = right / rows
    for x in accuracy_interval(right, rows):
        assert (p - x) ** 2 == pytest.approx(1.96**2 * x * (1 - x) / rows, abs=1e-12)


def test_wilson_refuses_nonsense():
    for right, rows in ((0, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueRangeError):
            accuracy_interval(right, rows)


def test_bootstrap():
    g = torch.Generator().manual_seed(0)
    ours, theirs = torch.rand(2000, generator=g) < 0.8, torch.rand(2000, generator=g) < 0.7
    difference, low, high = bootstrap_difference(ours, theirs)
    sd = float((ours.double() - theirs.double()).std()) / 2000**0.5
    assert difference == pytest.approx(float(ours.double().mean() - theirs.double().mean()))
    assert (low, high) == pytest.approx((difference - 1.96 * sd, difference + 1.96 * sd), abs=0.15 * sd)
    assert bootstrap_difference(ours, theirs) == (difference, low, high)
    assert bootstrap_difference(ours, ours) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueRangeError):
        bootstrap_difference(ours[:0], theirs[:0])


def test_bootstrap_in_several_chunks():
    big = torch.arange(30_000) % 3 == 0
    difference, low, high = bootstrap_difference(big, ~big, draws=150)
    assert difference == pytest.approx(-1 / 3)
    assert low < difference < high
    assert high - low < 0.04


def test_near_decision():
    at = [0.0, 0.0]  # max-prob .5 exactly
    near, far, sure = [1e-6, 0.0], [1.0, 0.0], [9.0, 0.0]
    rows = [[sure, at, at], [far, sure, at], [far, far, sure], [near, sure, sure]]
    trace = ExitTrace(torch.tensor(rows).transpose(0, 1))
    policy = MaxProb(0.9)
    outcome = simulate(policy, trace, COSTS)
    assert outcome.exit.tolist() == [0, 1, 2, 1]
    # row 0 leaves before its ties; row 3 has a tie on its way
    assert near_decision(policy, trace, outcome).tolist() == [False, False, False, True]
    threshold = torch.softmax(torch.tensor(far), 0).max().item()
    for shift, expected in ((0.0, True), (5e-6, True), (-5e-6, True), (1e-3, False), (-1e-3, False)):
        policy = MaxProb(threshold + shift)
        flagged = near_decision(policy, trace, simulate(policy, trace, COSTS))
        assert flagged[1].item() is expected
    policy = BEEM((1.0, 1.0, 1.0), (threshold, 0.1, 0.0))
    assert near_decision(policy, trace, simulate(policy, trace, COSTS)).tolist() == [False, True, True, True]


def test_counts_are_not_near():
    """Patience's count equals its threshold in every row that leaves on time; rounding does not change a count."""
    logits = torch.tensor([5.0, 0.0]).expand(3, 4, 2).clone()
    logits[1, 3] = torch.tensor([1e-6, 0.0])
    trace = ExitTrace(logits)
    outcome = simulate(Patience(1), trace, COSTS)
    assert outcome.exit.tolist() == [1] * 4
    assert near_decision(Patience(1), trace, outcome).tolist() == [False, False, False, True]
