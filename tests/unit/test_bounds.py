"""P-values and bounds against other implementations, by hand, and by simulation."""

import math

import numpy as np
import pytest
import torch
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value, get_r_hat_plus
from scipy.stats import beta, binom

from offramp.calibrate.bounds import (
    betting_p,
    binomial_cdf,
    clopper_pearson,
    count_p,
    hoeffding_bentkus_p,
    rows_needed,
    upper_bound,
)
from offramp.errors import ValueRangeError

RATES = (1e-4, 0.01, 0.1, 0.5, 0.97)
SIZES = (1, 7, 100, 1000, 50_000)


def zero_one(rows: int, losses: int, seed: int = 0) -> torch.Tensor:
    """Losses of 0 and 1 in random order."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return (order < losses).float()


# --- the binomial ---


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("rows", SIZES)
def test_the_binomial_is_scipys(rows, rate):
    middle = round(rows * rate)
    counts = sorted({min(rows, max(0, c)) for c in (0, 1, middle // 2, middle - 3, middle, middle + 3, rows - 1, rows)})
    expected = binom.cdf(counts, rows, rate)
    # lgamma of large n leaves a relative error of about 1e-16 n log n
    assert [binomial_cdf(c, rows, rate) for c in counts] == pytest.approx(expected, rel=1e-8, abs=1e-300)
    assert [binomial_cdf(c, rows, rate) for c in counts] == pytest.approx(expected, rel=1e-8, abs=1e-300)
    assert count_p(torch.tensor(counts), rows, rate).tolist() == pytest.approx(expected, rel=1e-8, abs=1e-300)


def test_the_binomial_at_its_ends():
    assert binomial_cdf(-1, 10, 0.3) == 0.0
    assert binomial_cdf(10, 10, 0.3) == binomial_cdf(12, 10, 0.3) == 1.0
    assert binomial_cdf(3, 10, 0.0) == 1.0
    assert binomial_cdf(3, 10, 1.0) == 0.0
    assert count_p(torch.tensor([[0, 10], [10, 0]]), 10, 0.5).tolist() == [
        pytest.approx([0.5**10, 1.0]),
        pytest.approx([1.0, 0.5**10]),
    ]
    for epsilon in (0.0, 1.0):
        with pytest.raises(ValueRangeError, match="between 0 and 1"):
            count_p(torch.tensor([1]), 10, epsilon)


@pytest.mark.parametrize("delta", [0.01, 0.1, 0.5])
@pytest.mark.parametrize(("losses", "rows"), [(0, 1), (0, 229), (3, 20), (19, 20), (40, 400), (900, 30_000)])
def test_clopper_pearson_is_a_quantile_of_a_beta(losses, rows, delta):
    bound = clopper_pearson(losses, rows, delta)
    assert bound == pytest.approx(beta.ppf(1 - delta, losses + 1, rows - losses), rel=1e-7)
    assert binomial_cdf(losses, rows, bound) == pytest.approx(delta, rel=1e-6)


def test_when_all_rows_lose_nothing_is_ruled_out():
    assert clopper_pearson(7, 7, 0.1) == 1.0
    for method in ("ltt", "betting"):
        assert upper_bound(torch.ones(50), method, 0.1, least=0.0) == pytest.approx(1.0)


# --- Hoeffding-Bentkus ---

GRID = [
    (mean, rows, epsilon)
    for mean in (0.0, 0.004, 0.05, 0.1234567, 0.3, 0.8, 1.0)
    for rows in (1, 10, 250, 4000)
    for epsilon in (0.01, 0.05, 0.1, 0.3, 0.9)
]


@pytest.mark.parametrize(("mean", "rows", "epsilon"), GRID)
def test_hoeffding_bentkus_is_mapies(mean, rows, epsilon):
    theirs = float(compute_hoeffding_bentkus_p_value(np.array([mean]), rows, epsilon)[0, 0])
    assert hoeffding_bentkus_p(mean, rows, epsilon) == pytest.approx(theirs, rel=1e-7, abs=1e-300)


@pytest.mark.parametrize(("mean", "rows", "epsilon"), [(0.0, 10, 0.1), (0.05, 60, 0.1), (0.26, 50, 0.3), (0.4, 9, 0.2)])
def test_hoeffding_bentkus_by_hand(mean, rows, epsilon):
    most = math.ceil(rows * mean - 1e-9)
    bentkus = math.e * sum(
        math.comb(rows, c) * epsilon**c * (1 - epsilon) ** (rows - c) for c in range(min(most, rows) + 1)
    )
    low = min(mean, epsilon)
    first = 0.0 if low == 0 else low * math.log(low / epsilon)
    hoeffding = math.exp(-rows * (first + (1 - low) * math.log((1 - low) / (1 - epsilon))))
    assert hoeffding_bentkus_p(mean, rows, epsilon) == pytest.approx(min(1.0, bentkus, hoeffding))


def test_hoeffding_bentkus_at_its_ends_and_never_below_the_binomial():
    assert hoeffding_bentkus_p(0.0, 10, 0.0) == 1.0
    assert hoeffding_bentkus_p(0.5, 10, 1.0) == 0.0
    for losses in (0, 2, 8, 20):
        assert hoeffding_bentkus_p(losses / 200, 200, 0.1) >= binomial_cdf(losses, 200, 0.1) * (1 - 1e-9)


# --- betting ---


def slow_betting_p(
    losses: list[float], epsilon: float, delta: float, *, least: float = 0.0, cut=None, halves: bool = False
) -> float:
    """The capital row by row, in plain Python.

    Args:
        cut: the largest bet; None for three quarters of what could ruin the gambler.
        halves: the best moments of both halves of the rows are added, as MAPIE does, in place of the best moment.
    """
    level, rows = (epsilon - least) / (1 - least), len(losses)
    cut = 0.75 / (1 - level) if cut is None else cut
    seen, squares, variance, logs = 0.0, 0.0, 0.25, []
    for i, loss in enumerate(losses, start=1):
        unit = (loss - least) / (1 - least)
        bet = min(cut, math.sqrt(2 * math.log(1 / delta) / (rows * variance)))
        logs.append(math.log(max(1e-300, 1 + bet * (level - unit))))
        seen += unit
        mean = (0.5 + seen) / (i + 1)
        squares += (unit - mean) ** 2
        variance = (0.25 + squares) / (i + 1)
    parts = [logs[: rows // 2], logs[rows - rows // 2 :]] if halves else [logs]
    return min(1.0, math.exp(-sum(max(np.cumsum(part)) for part in parts)))


@pytest.mark.parametrize("least", [0.0, -1.0])
@pytest.mark.parametrize("rows", [1, 30, 400])
def test_betting_row_by_row(rows, least):
    g = torch.Generator().manual_seed(rows)
    many = torch.rand(6, rows, generator=g).pow(4)
    many[3:] = (many[3:] * 4).floor().clamp(max=1)
    many = many * (1 - least) / 2 + least / 2 if least else many
    for epsilon in (0.02, 0.2, 0.6):
        for delta in (0.05, 0.3):
            expected = [slow_betting_p(row.tolist(), epsilon, delta, least=least) for row in many]
            assert betting_p(many, epsilon, delta, least=least).tolist() == pytest.approx(expected, rel=1e-9)


def test_betting_at_its_ends():
    losses = zero_one(50, 3)
    assert float(betting_p(losses, 0.0, 0.1)) == 1.0
    assert float(betting_p(losses, 1.0, 0.1)) == 0.0
    assert float(betting_p(losses, -0.5, 0.1, least=-1.0)) == 1.0
    assert float(betting_p(torch.ones(50), 0.1, 0.1)) == 1.0


def slow_bound(losses: list[float], delta: float, grid: np.ndarray, **how) -> float:
    """The first rate of a grid that is ruled out, as MAPIE takes it."""
    return next(float(rate) for rate in grid if slow_betting_p(losses, float(rate), delta, **how) < delta)


@pytest.mark.parametrize("rate", [0.03, 0.1, 0.25])
def test_betting_bounds_are_mapies_but_for_two_known_causes(rate):
    rows, delta, grid = 400, 0.1, np.linspace(0.0, 0.6, 61)
    g = torch.Generator().manual_seed(1)
    many = torch.stack([(torch.rand(rows, generator=g) < rate).float() for _ in grid])
    _, theirs = get_r_hat_plus(many.double().T.numpy(), grid, "rcps", "wsr", delta, 0.25)
    ours = np.array([upper_bound(row, "betting", delta, least=0.0) for row in many[:20]])
    # by as much as 0.06 apart for one sample, by 0.02 on average; a step of MAPIE's grid, rounded up, is 0.01
    assert np.abs(theirs[:20] - ours).max() <= 0.06
    assert np.abs(theirs[:20] - ours).mean() <= 0.02
    # Two causes, which the slow formula shows one by one; plug-in variance and its start at 0.25 are the same.
    # 1. To save memory, MAPIE starts the capital anew at the middle row and adds the best moments of both halves. That
    #    is not the best moment of the whole, for which Ville's inequality holds. With it, the bound is MAPIE's exactly:
    for row, bound in zip(many[:8], theirs, strict=False):
        assert slow_bound(row.tolist(), delta, grid, cut=1.0, halves=True) == pytest.approx(bound)
    # 2. Bets are cut at 1 there, here at 0.75 / (1 - rate): where few rows lose, bets reach that and the bounds are
    #    0.02 apart; where more do, without the first cause, they are the same to the step of the grid.
    for row, bound in zip(many[:8], ours, strict=False):
        apart = slow_bound(row.tolist(), delta, grid, cut=1.0) - bound
        assert (-0.01 if rate < 0.1 else -1e-9) <= apart <= (0.02 if rate < 0.1 else 0.01 + 1e-9)
        exact = slow_bound(row.tolist(), delta, grid) - bound
        assert -1e-9 <= exact <= 0.01 + 1e-9


# --- bounds of one policy ---


@pytest.mark.parametrize("method", ["ltt", "betting"])
def test_bounds_rise_with_the_number_of_losses_and_fall_with_delta_and_rows(method):
    for rows in (60, 400):
        found = [upper_bound(zero_one(rows, c), method, 0.1, least=0.0) for c in (0, 1, 3, 8, 20, 50)]
        assert found == sorted(found)
        assert all(bound > c / rows for bound, c in zip(found, (0, 1, 3, 8, 20, 50), strict=True))
    by_delta = [upper_bound(zero_one(400, 20), method, delta, least=0.0) for delta in (0.01, 0.05, 0.2, 0.5)]
    assert by_delta == sorted(by_delta, reverse=True)
    # betting's depend on the order of rows, so that it takes many more rows to be surely tighter
    sizes = (100, 6400) if method == "betting" else (100, 400, 1600, 6400)
    by_rows = [upper_bound(zero_one(n, n // 20), method, 0.1, least=0.0) for n in sizes]
    assert by_rows == sorted(by_rows, reverse=True)


def test_bounds_of_losses_between_0_and_1_rise_with_every_loss():
    g = torch.Generator().manual_seed(0)
    losses = torch.rand(200, generator=g) * 0.3
    found = [upper_bound((losses + step).clamp(max=1), "ltt", 0.1, least=0.0) for step in (0.0, 0.1, 0.3, 0.6)]
    assert found == sorted(found)
    assert found[0] > float(losses.mean())


def test_signed_bounds_may_be_below_zero():
    gains = -zero_one(2000, 400)
    assert -0.2 < upper_bound(gains, "betting", 0.1, least=-1.0) < 0
    assert upper_bound(torch.zeros(2000), "betting", 0.1, least=-1.0) < 0.003


@pytest.mark.parametrize("least", [0.0, -1.0])
def test_p_values_fall_with_the_risk_that_is_asked_about(least):
    g = torch.Generator().manual_seed(2)
    losses = torch.rand(20, 300, generator=g) * (1 - least) + least
    found = torch.stack([betting_p(losses, e, 0.1, least=least) for e in torch.linspace(0.01, 0.99, 30).tolist()])
    assert (found.diff(dim=0) <= 1e-12).all()
    assert [hoeffding_bentkus_p(0.1, 100, e) for e in (0.1, 0.15, 0.2, 0.4)] == sorted(
        (hoeffding_bentkus_p(0.1, 100, e) for e in (0.1, 0.15, 0.2, 0.4)), reverse=True
    )


# --- how many rows ---


def test_rows_needed_without_losses_is_a_logarithm():
    assert rows_needed(0.0, 0.01, 0.1) == 230  # 0.99 ** 229 is 0.1001
    for epsilon in (0.001, 0.01, 0.03, 0.2, 0.7):
        for delta in (0.01, 0.1, 0.4):
            assert rows_needed(0.0, epsilon, delta) == math.ceil(math.log(delta) / math.log1p(-epsilon))


@pytest.mark.parametrize(
    ("rate", "epsilon", "delta"),
    [(0.0, 0.01, 0.1), (0.002, 0.01, 0.1), (0.008, 0.01, 0.05), (0.1, 0.2, 0.01), (0.45, 0.5, 0.3)],
)
def test_rows_needed_are_enough_and_one_fewer_is_not(rate, epsilon, delta):
    needed = rows_needed(rate, epsilon, delta)
    assert binom.cdf(math.floor(rate * needed), needed, epsilon) <= delta
    assert binom.cdf(math.floor(rate * (needed - 1)), needed - 1, epsilon) > delta


def test_no_number_of_rows_is_enough():
    for rate, epsilon in ((0.01, 0.01), (0.2, 0.1), (0.0, 0.0), (0.0, 1.0)):
        assert rows_needed(rate, epsilon, 0.1) is None
    assert rows_needed(0.0099999, 0.01, 0.1, most=10_000) is None


# --- validity: where the risk is exactly epsilon, at most delta of all draws may deny it ---

DRAWS, ROWS = 2000, 400


def drawn(values: list[float], chances: list[float], seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    place = torch.multinomial(torch.tensor(chances), DRAWS * ROWS, replacement=True, generator=g)
    return torch.tensor(values)[place].view(DRAWS, ROWS)


def at_most(delta: float) -> float:
    return delta + 3 * math.sqrt(delta * (1 - delta) / DRAWS)


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_p_values_of_zero_one_losses_are_valid(epsilon, delta):
    losses = drawn([0.0, 1.0], [1 - epsilon, epsilon], seed=3)
    counts = losses.sum(dim=1).long()
    exact = count_p(counts, ROWS, epsilon)
    bentkus = torch.tensor([hoeffding_bentkus_p(c / ROWS, ROWS, epsilon) for c in range(ROWS + 1)])[counts]
    bets = betting_p(losses, epsilon, delta)
    for p in (exact, bentkus, bets):
        assert float((p <= delta).double().mean()) <= at_most(delta)
    # and the exact one wastes nothing: it denies every count that it may
    last = binom.ppf(delta, ROWS, epsilon) - 1
    assert float((exact <= delta).double().mean()) >= binom.cdf(last, ROWS, epsilon) - (at_most(delta) - delta)


@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_p_values_of_losses_between_0_and_1_are_valid(delta):
    losses = drawn([0.0, 0.5, 1.0], [0.8, 0.15, 0.05], seed=4)
    epsilon = 0.125
    bentkus = torch.tensor([hoeffding_bentkus_p(float(m), ROWS, epsilon) for m in losses.double().mean(dim=1)])
    for p in (bentkus, betting_p(losses, epsilon, delta)):
        assert float((p <= delta).double().mean()) <= at_most(delta)


@pytest.mark.parametrize(("down", "up"), [(0.0, 0.02), (0.03, 0.05), (0.3, 0.35), (0.05, 0.04)])
@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_betting_is_valid_for_signed_losses(down, up, delta):
    losses = drawn([-1.0, 0.0, 1.0], [down, 1 - down - up, up], seed=5)
    p = betting_p(losses, up - down, delta, least=-1.0)
    assert float((p <= delta).double().mean()) <= at_most(delta)


def test_betting_has_power():
    losses = drawn([-1.0, 0.0, 1.0], [0.02, 0.96, 0.02], seed=6)
    assert float((betting_p(losses, 0.05, 0.1, least=-1.0) <= 0.1).double().mean()) > 0.9
