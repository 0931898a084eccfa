"""P-values and bounds of a mean loss from n rows: what a promise rests on. No distribution is assumed."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from offramp.errors import ValueRangeError

__all__ = [
    "betting_p", "binomial_cdf", "clopper_pearson", "count_p", "hoeffding_bentkus_p", "rows_needed",
    "upper_bound",
]  # fmt: skip


def binomial_cdf(count: int, rows: int, rate: float) -> float:
    """P(Bin(rows, rate) <= count), exact."""
    if count >= rows or rate <= 0:
        return 1.0
    if count < 0 or rate >= 1:
        return 0.0
    x = torch.arange(count + 1, dtype=torch.float64)
    log = math.lgamma(rows + 1) - torch.lgamma(x + 1) - torch.lgamma(rows - x + 1)
    log = log + x * math.log(rate) + (rows - x) * math.log1p(-rate)
    return min(1.0, float(torch.logsumexp(log, dim=0).exp()))


def hoeffding_bentkus_p(mean: float, rows: int, epsilon: float) -> float:
    """The p-value of "the risk is above epsilon" for losses in [0, 1] with this mean; not valid for signed losses.

    min(e BinCDF(ceil(n R); n, eps), exp(-n kl(min(R, eps), eps)))

    Source: Bates et al. 2021 (RCPS); Angelopoulos et al. 2021 (Learn then Test), proposition 3.
    """
    if not 0 < epsilon < 1:
        return 1.0 if epsilon <= 0 else 0.0
    bentkus = math.e * binomial_cdf(math.ceil(rows * mean - 1e-9), rows, epsilon)
    return min(1.0, bentkus, math.exp(-rows * _kl(min(mean, epsilon), epsilon)))


def betting_p(
    losses: Float[Tensor, "*draw row"], epsilon: float, delta: float, *, least: float = 0.0
) -> Float[Tensor, "*draw"]:
    """The p-value of "the risk is above epsilon" for losses in [least, 1]: one over the largest capital of a gambler.

        K_t = prod_{i <= t} (1 + nu_i (epsilon - L_i))        nu_i >= 0, known before row i

    If the risk is above epsilon the capital is a supermartingale, and reaches 1/p with a chance of at most p (Ville).
    The bets are the paper's predictable plug-in: large where the losses so far vary little. Rows must be in random
    order.

    Args:
        delta: for which the bets are made; the p-value is valid for any.
        least: the smallest loss, -1 for a signed one.

    Source: Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", section 4. Losses
    are brought to [0, 1], and bets are cut at three quarters of what could ruin the gambler.
    """
    x = losses.double()
    rows, span = x.shape[-1], 1.0 - least
    unit = (x - least) / span
    i = torch.arange(1, rows + 1, dtype=torch.float64)
    mean = (0.5 + unit.cumsum(-1)) / (i + 1)
    variance = (0.25 + (unit - mean).square().cumsum(-1)) / (i + 1)
    before = torch.cat([torch.full_like(variance[..., :1], 0.25), variance[..., :-1]], dim=-1)
    bet = (2 * math.log(1 / delta) / (rows * before)).sqrt()
    level = (epsilon - least) / span
    if level <= 0:
        return torch.ones(x.shape[:-1], dtype=torch.float64)
    if level >= 1:
        return torch.zeros(x.shape[:-1], dtype=torch.float64)
    # a loss of 1 must not ruin the gambler
    bet = bet.clamp(max=0.75 / (1 - level))
    capital = torch.log1p(bet * (level - unit)).cumsum(-1).amax(-1)
    return (-capital).exp().clamp(max=1.0)


def clopper_pearson(losses: int, rows: int, delta: float) -> float:
    """The smallest rate that `losses` of `rows` rule out at level delta: an upper bound of the risk of one policy."""
    return _bisect(lambda rate: binomial_cdf(losses, rows, rate) <= delta)


def upper_bound(losses: Float[Tensor, "row"], method: str, delta: float, *, least: float) -> float:
    """An upper bound of the risk of one policy, true with a chance of at least 1 - delta."""
    if method == "betting":
        return _bisect(lambda rate: float(betting_p(losses, rate, delta, least=least)) <= delta, low=least)
    if set(losses.unique().tolist()) <= {0.0, 1.0}:
        return clopper_pearson(int(losses.sum()), len(losses), delta)
    mean = float(losses.double().mean())
    return _bisect(lambda rate: hoeffding_bentkus_p(mean, len(losses), rate) <= delta)


def rows_needed(rate: float, epsilon: float, delta: float, *, most: int = 10_000_000) -> int | None:
    """A number of rows at which a share `rate` of losses is certified by the exact binomial; None if none is found.

    With a rate of 0 it is the smallest, ceil(log delta / log(1 - epsilon)). With another, whole losses make the p-value
    a sawtooth, and some smaller numbers may do; at one row less than this they do not.
    """
    if not 0 < epsilon < 1 or rate >= epsilon:
        return None
    low, high = 0, 1
    while binomial_cdf(math.floor(rate * high), high, epsilon) > delta:
        low, high = high, 2 * high
        if high > most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if binomial_cdf(math.floor(rate * middle), middle, epsilon) <= delta:
            high = middle
        else:
            low = middle
    return high


def count_p(losses: Int[Tensor, "*draw"], rows: int, epsilon: float) -> Float[Tensor, "*draw"]:
    """`binomial_cdf` of many counts at once: the p-values of "the risk of a 0/1 loss is above epsilon"."""
    most = int(losses.max()) if losses.numel() else 0
    if not 0 < epsilon < 1:
        raise ValueRangeError(f"epsilon is {epsilon!r}; expected a number between 0 and 1.")
    x = torch.arange(most + 1, dtype=torch.float64)
    log = math.lgamma(rows + 1) - torch.lgamma(x + 1) - torch.lgamma(rows - x + 1)
    log = log + x * math.log(epsilon) + (rows - x) * math.log1p(-epsilon)
    return torch.logcumsumexp(log, dim=0).exp().clamp(max=1.0)[losses]


def _kl(a: float, b: float) -> float:
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)


def _bisect(ruled_out: object, low: float = 0.0, high: float = 1.0) -> float:
    """The smallest rate that is ruled out, when larger ones are, too."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if ruled_out(middle) else (middle, high)  # type: ignore[operator]
    return high
