"""Thresholds from exit shares, against plain Python: sequential quotas, MSDNet's geometric shares and EERO's."""

import itertools
import math
import random

import pytest
import torch
from torch.nn.functional import one_hot

from offramp.calibrate import calibrate, quota_thresholds
from offramp.cost import Budget, CostModel
from offramp.errors import ValueRangeError
from offramp.policies import EERO, MaxProb, MSDNet, visits
from offramp.scores import max_prob
from offramp.simulate import simulate
from offramp.trace import ExitTrace

ROWS = 600


def slow_quotas(scores: list[list[float]], quotas: list[int]) -> tuple[list[float | None], list[int]]:
    """(thresholds, None for an exit without a quota; how many rows leave at each exit), for quotas in rows."""
    waiting, thresholds, left = set(range(len(scores[0]))), [], []
    for score, quota in zip(scores, quotas, strict=True):
        best = sorted((score[i] for i in waiting), reverse=True)[:quota]
        thresholds.append(best[-1] if best else None)
        leaving = {i for i in waiting if best and score[i] >= best[-1]}
        left.append(len(leaving))
        waiting -= leaving
    return thresholds, [*left, len(waiting)]


def geometric(q: float, exits: int) -> list[float]:
    """Shares proportional to q^k, k from 1."""
    powers = [q**k for k in range(1, exits + 1)]
    return [v / sum(powers) for v in powers]


def made_trace(exits: int, classes: int, seed: int) -> ExitTrace:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (ROWS,), generator=g)
    grow = torch.linspace(1, 3, exits)[:, None, None]
    return ExitTrace(torch.randn(exits, ROWS, classes, generator=g) + grow * one_hot(labels, classes), labels)


def early_scores(trace: ExitTrace, visited) -> list[list[float]]:
    return max_prob(trace.logits[list(visited[:-1])]).tolist()


def counts_of(policy, trace: ExitTrace, costs: CostModel, visited) -> list[int]:
    """How many rows leave at each of some exits."""
    shares = simulate(policy, trace, costs).shares
    assert sum(shares[k] for k in visited) == pytest.approx(1)
    return [round(shares[k] * trace.rows) for k in visited]


def uneven(exits: int) -> CostModel:
    return CostModel.from_costs([(k + 1) ** 1.3 for k in range(exits)])


@pytest.mark.parametrize("seed", range(25))
def test_quotas_against_a_slow_loop(seed):
    rnd = random.Random(seed)
    early, n = rnd.randrange(1, 6), rnd.choice((1, 2, 10, 57))
    raw = [rnd.random() ** 2 * (rnd.random() < 0.8) for _ in range(early + 1)]
    shares = [v / (sum(raw) or 1) for v in raw]
    grid = rnd.choice((2, 5, 1_000_000))  # a coarse one ties nearly everywhere
    scores = torch.tensor([[rnd.randrange(grid) / grid for _ in range(n)] for _ in range(early)])
    thresholds, on = quota_thresholds(scores, shares)
    expected, left = slow_quotas(scores.tolist(), [math.floor(s * n + 1e-9) for s in shares[:-1]])
    assert list(on) == [t is not None for t in expected]
    for ours, theirs in zip(thresholds, expected, strict=True):
        assert theirs is None or ours == theirs
    logits = torch.stack([scores.clamp(0.001, 0.999), torch.zeros_like(scores)], dim=-1)  # rises with the score
    trace = ExitTrace(torch.cat([logits, torch.zeros(1, n, 2)]))
    confidences = torch.sigmoid(torch.tensor([0.0 if t is None else min(0.999, max(0.001, t)) for t in expected]))
    policy = MaxProb((*(confidences - 1e-7).tolist(), 0.0), (*on, True))
    assert counts_of(policy, trace, CostModel.from_costs(range(1, early + 2)), range(early + 1)) == left


def test_every_quota_is_filled_where_nothing_ties():
    scores = torch.rand(4, 1000, generator=torch.Generator().manual_seed(0))
    shares = (0.1, 0.25, 0.0, 0.333)
    _, on = quota_thresholds(scores, shares)
    assert on == (True, True, False, True)
    _, left = slow_quotas(scores.tolist(), [100, 250, 0, 333])
    assert left == [100, 250, 0, 333, 317]
    # more than there is: the first takes all, nothing is left to ask for
    thresholds, on = quota_thresholds(scores, (1.0, 0.5, 0.0, 0.0))
    assert thresholds[0] == scores[0].min()
    assert on == (True, False, False, False)


def test_shares_that_cannot_be_are_refused():
    scores = torch.rand(3, 10)
    for shares in ((0.5, 0.5), (0.5, -0.1, 0.6, 0.0)):
        with pytest.raises(ValueRangeError, match="shares"):
            quota_thresholds(scores, shares)


CASES = [
    (2, 10, 0.6, None),
    (3, 2, 0.5, None),
    (4, 10, 0.3, None),
    (4, 10, 0.7, (True, False, True, True)),
    (6, 3, 0.25, None),
    (6, 3, 0.5, None),
    (6, 10, 0.8, (False, True, True, False, True, False)),
    (9, 10, 0.6, None),
]


@pytest.mark.parametrize(("exits", "classes", "budget", "flags"), CASES)
def test_msdnet_takes_geometric_shares_by_quotas(exits, classes, budget, flags):
    trace, costs = made_trace(exits, classes, exits), uneven(exits)
    made = calibrate(MSDNet, trace, costs, Budget(fraction=budget), enabled=flags)
    assert type(made.policy) is MSDNet
    visited = visits(MaxProb(0.0, flags), exits)
    counts = counts_of(made.policy, trace, costs, visited)
    # thresholds: those of the slow quotas for as many rows
    expected, left = slow_quotas(early_scores(trace, visited), counts[:-1])
    assert left == counts
    for k, threshold in zip(visited, expected, strict=False):
        if threshold is None:
            assert made.policy.enabled is not None
            assert not made.policy.enabled[k]
        else:
            assert made.policy.enabled is None or made.policy.enabled[k]
            assert made.policy.thresholds[k] == threshold
    # shares: some q gives exactly these rows, so that each is within 1 of q^k's
    assert any(rows_of(q, len(visited)) == counts for q in near_ratio(counts))


def rows_of(q: float, exits: int) -> list[int]:
    """How many of the rows leave at each exit by geometric shares."""
    early = [math.floor(s * ROWS + 1e-9) for s in geometric(q, exits)[:-1]]
    return [*early, ROWS - sum(early)]


def near_ratio(counts: list[int]) -> list[float]:
    """Many values between the smallest and the largest ratio that counts of whole rows leave open."""
    room = [(a, b) for a, b in itertools.pairwise(counts[:-1]) if a > 0 and b > 0]
    low = max((b / (a + 1) for a, b in room), default=1e-4)
    high = min(((b + 1) / a for a, b in room), default=1e4)
    assert low <= high, "the ratios of neighbouring shares differ by more than rounding"
    return [low * (high / low) ** (i / 20_000) for i in range(20_001)]


@pytest.mark.parametrize(("exits", "classes", "budget", "flags"), CASES)
def test_no_slow_sweep_of_q_uses_the_budget_better(exits, classes, budget, flags):
    trace, costs = made_trace(exits, classes, exits), uneven(exits)
    made = calibrate(MSDNet, trace, costs, Budget(fraction=budget), enabled=flags)
    visited = visits(MaxProb(0.0, flags), exits)
    scores, cumulative = early_scores(trace, visited), costs.cumulative(flags)
    price = [cumulative[k] for k in visited]

    def spent(q: float) -> float:
        _, left = slow_quotas(scores, rows_of(q, len(visited))[:-1])
        return sum(n * c for n, c in zip(left, price, strict=True)) / ROWS

    coarse = [10 ** (i / 20) for i in range(-80, 81)]
    low = max(q for q in coarse if spent(q) <= budget)
    best = max(c for c in (spent(low * 10 ** (i / 4000)) for i in range(201)) if c <= budget)
    assert made.achieved == pytest.approx(simulate(made.policy, trace, costs).cost)
    assert made.achieved <= budget * (1 + 1e-9)
    assert made.achieved >= best * 0.998
    assert made.status == "met"


def test_heads_that_cost_stay_within_the_budget():
    trace, costs = made_trace(5, 10, 1), CostModel(stage=(0.2,) * 5, head=(0.04, 0.03, 0.02, 0.01, 0.0))
    for budget in (0.27, 0.35, 0.5, 0.75, 0.97, 1.05):
        made = calibrate(MSDNet, trace, costs, Budget(fraction=budget))
        assert made.status in ("met", "best_effort")
        assert simulate(made.policy, trace, costs).cost == pytest.approx(made.achieved)
        assert made.achieved <= budget * (1 + 1e-9)


def test_msdnet_decides_as_max_prob_does():
    trace, costs = made_trace(4, 5, 2), uneven(4)
    policy = calibrate(MSDNet, trace, costs, Budget(fraction=0.5)).policy
    other = simulate(MaxProb(policy.thresholds, policy.enabled), trace, costs)
    assert torch.equal(simulate(policy, trace, costs).exit, other.exit)
    assert len(other.exit.unique()) == 4


def test_ties_take_more_than_their_quota_and_the_budget_still_holds():
    g = torch.Generator().manual_seed(4)
    coarse = ExitTrace(torch.randint(0, 3, (4, ROWS, 3), generator=g).float())
    for budget in (0.4, 0.6, 0.8):
        made = calibrate(MSDNet, coarse, uneven(4), Budget(fraction=budget))
        assert simulate(made.policy, coarse, uneven(4)).cost <= budget * (1 + 1e-9)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7])
def test_eero_weighs_errors_against_costs(budget):
    """log s_k + beta R_k falls or rises in proportion to the cost b_k: its slope is the same between all exits."""
    trace, costs, exits, beta = made_trace(5, 10, 3), uneven(5), 5, 5.0
    made = calibrate(EERO, trace, costs, Budget(fraction=budget))
    counts = counts_of(made.policy, trace, costs, range(exits))
    assert slow_quotas(early_scores(trace, range(exits)), counts[:-1])[0] == list(made.policy.thresholds[:-1])
    assert min(counts) > exits
    errors = [1 - v for v in trace.accuracy()]
    # the largest and smallest value that whole rows leave open; the last exit takes what the floors of the others left
    log = [
        (math.log((n - (exits if k == exits - 1 else 0)) / ROWS) + beta * e, math.log((n + 1) / ROWS) + beta * e)
        for k, (n, e) in enumerate(zip(counts, errors, strict=True))
    ]
    slopes = [
        ((d[0] - c[1]) / (b - a), (d[1] - c[0]) / (b - a))
        for (a, c), (b, d) in itertools.pairwise(zip(costs.cumulative(), log, strict=True))
    ]
    assert max(low for low, _ in slopes) <= min(high for _, high in slopes)
    assert 0.98 * budget <= made.achieved <= budget * (1 + 1e-9)
