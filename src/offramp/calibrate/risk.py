"""Risk as a target: the cheapest policy whose loss on new rows is bounded, with a stated confidence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.calibrate.bounds import betting_p, count_p, hoeffding_bentkus_p, rows_needed, upper_bound
from offramp.cost import Budget
from offramp.errors import ValueRangeError
from offramp.sweep import Said
from offramp.trace import ExitTrace

__all__ = ["Joint", "Promise", "Risk", "certified", "losses_of", "needed_rows", "promise_of"]

Loss = Literal["drop", "disagreement", "signed drop"]
Method = Literal["auto", "ltt", "betting", "crc", "plain"]


@dataclass(frozen=True)
class Risk:
    """A bound on what early exits may lose on new rows like the certify rows.

    Args:
        epsilon: the bound, in parts of one: 0.01 is one row in a hundred.
        delta: the chance that the bound does not hold, over draws of the certify rows. "crc" bounds the mean over such
            draws and has no delta.
        loss: of one row at the exit taken. "drop": the full model is right and the exit is not (0 or 1).
            "disagreement": the exit's answer is not the full model's (0 or 1; needs no labels). "signed drop": the
            drop, less the rows that the exit gets right and the full model does not (-1, 0, 1): lost accuracy itself.
        method: "ltt": Learn then Test, policies tested from the safest on, by the exact binomial for losses of 0 and 1
            and Hoeffding-Bentkus otherwise. "betting": the same with the bound of Waudby-Smith and Ramdas. "crc":
            conformal risk control. "plain": no promise, the loss on the certify rows alone is bounded; to compare with.
            "auto" is "ltt", and for the signed drop "betting", because the others are not valid there.

    Source: Angelopoulos et al. 2021 (Learn then Test) and 2022 (conformal risk control); Waudby-Smith and Ramdas 2024;
    Jazbec et al. 2024 (Fast yet Safe) for early exits.
    """

    epsilon: float | int
    delta: float | int = 0.1
    loss: Loss = "drop"
    method: Method = "auto"

    def __post_init__(self) -> None:
        for name, low in (("epsilon", 0.0), ("delta", None)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not (value >= 0 if low is not None else value > 0) or value >= 1:
                raise ValueRangeError(
                    f"{name} is {value!r}; expected a number {'from' if low == 0 else 'above'} 0 and below 1."
                )
            object.__setattr__(self, name, float(value))
        if self.loss not in get_args(Loss):
            raise ValueRangeError(f"loss is {self.loss!r}; expected one of {', '.join(get_args(Loss))}.")
        if self.method not in get_args(Method):
            raise ValueRangeError(f"method is {self.method!r}; expected one of {', '.join(get_args(Method))}.")
        if self.loss == "signed drop" and self.method in ("ltt", "crc"):
            raise ValueRangeError(f"method {self.method!r} is not valid for a signed drop; use 'betting' or 'plain'.")

    @property
    def used(self) -> str:
        """The method, "auto" resolved."""
        if self.method != "auto":
            return self.method
        return "betting" if self.loss == "signed drop" else "ltt"

    @property
    def least(self) -> float:
        """The smallest loss of a row."""
        return -1.0 if self.loss == "signed drop" else 0.0

    def __str__(self) -> str:
        sure = "in the mean" if self.used == "crc" else f"with {100 * (1 - self.delta):.4g} % confidence"
        if self.used == "plain":
            sure = "on the certify rows only"
        return f"{self.loss} at most {100 * self.epsilon:.4g} %, {sure}"


@dataclass(frozen=True)
class Joint:
    """A risk and a budget at once.

    Args:
        risk: what new rows may lose.
        budget: what they may cost.
        prefer: "cheapest": the cheapest policy that is certified for the risk. "safest": the one that spends the
            budget, and the smallest risk that can be promised for it, which may be below or above `risk.epsilon`.
    """

    risk: Risk
    budget: Budget
    prefer: Literal["cheapest", "safest"] = "cheapest"

    def __post_init__(self) -> None:
        if not isinstance(self.risk, Risk) or not isinstance(self.budget, Budget):
            raise ValueRangeError(f"Joint is of {self.risk!r} and {self.budget!r}; expected a Risk and a Budget.")
        if self.prefer not in ("cheapest", "safest"):
            raise ValueRangeError(f"prefer is {self.prefer!r}; expected 'cheapest' or 'safest'.")
        if self.prefer == "safest" and self.risk.used in ("crc", "plain"):
            raise ValueRangeError(f"the method {self.risk.used!r} has no bound for one policy; use 'ltt' or 'betting'.")

    def __str__(self) -> str:
        return f"{self.prefer} with {self.risk} and {self.budget}"


@dataclass(frozen=True)
class Promise:
    """What is promised of a policy, and what that rests on.

    Args:
        loss, method: as in `Risk`.
        epsilon: the bound.
        delta: the chance that it does not hold; 0 where nothing leaves early, and for "crc", whose bound is of a mean;
            without a meaning for "plain", which promises nothing.
        observed: the mean loss on the certify rows.
        rows: how many they were.
        bound: an upper bound, at the same delta, of this one policy's risk, as if it had been chosen before; None for
            "crc" and "plain".
        needed: about how many certify rows would be needed at the loss seen, where there were too few.
    """

    loss: str
    method: str
    epsilon: float
    delta: float
    observed: float
    rows: int
    bound: float | None
    needed: int | None = None


def losses_of(said: Sequence[Said], trace: ExitTrace, loss: Loss) -> Float[Tensor, "policy row"]:
    """The loss of every row under every policy, float32."""
    full = trace.logits[-1].argmax(dim=-1)
    answers = torch.stack([one.said for one in said])
    if loss == "disagreement":
        return (answers != full).float()
    labels = trace.known_labels(f"the loss {loss!r}")
    right, early = (full == labels).float(), (answers == labels).float()
    return (right - early) if loss == "signed drop" else (right - early).clamp(min=0)


def certified(losses: Float[Tensor, "policy row"], risk: Risk, *, seed: int = 0) -> int:
    """The place of the last policy, from the safest on, that the risk is certified for; -1 for none.

    Fixed-sequence testing: the first policy that is not certified ends it, so the chance of any wrong certificate is at
    most delta, however many policies there are and whether or not their risks rise.

    Args:
        losses: from the safest policy to the boldest; the sequence must not have been chosen by these rows.
        seed: of the order of rows, which betting wants to be random.
    """
    rows = losses.shape[1]
    if risk.epsilon <= 0 and risk.used != "plain":
        return -1
    if risk.used == "plain":
        good = losses.double().mean(dim=1) <= risk.epsilon + 1e-12
    elif risk.used == "crc":
        # each row's loss made to rise with boldness, as the method asks
        mean = losses.cummax(dim=0).values.double().mean(dim=1)
        good = mean <= ((rows + 1) * risk.epsilon - 1.0) / rows + 1e-12
    elif risk.used == "betting":
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        good = betting_p(losses[:, order], risk.epsilon, risk.delta, least=risk.least) <= risk.delta
    elif bool(((losses == 0) | (losses == 1)).all()):
        good = count_p(losses.sum(dim=1).long(), rows, risk.epsilon) <= risk.delta
    else:
        means = losses.double().mean(dim=1).tolist()
        good = torch.tensor([hoeffding_bentkus_p(mean, rows, risk.epsilon) <= risk.delta for mean in means])
    bad = (~good).nonzero()[:, 0]
    return int(bad[0]) - 1 if len(bad) else len(losses) - 1


def promise_of(losses: Float[Tensor, "row"], risk: Risk, *, needed: int | None = None, seed: int = 0) -> Promise:
    """What is known of one certified policy from its losses on the certify rows."""
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(seed))
    bound = None
    if risk.used in ("ltt", "betting"):
        bound = upper_bound(losses[order], risk.used, risk.delta, least=risk.least)
    delta = 0.0 if risk.used == "crc" else risk.delta
    observed = float(losses.double().mean())
    return Promise(risk.loss, risk.used, risk.epsilon, delta, observed, len(losses), bound, needed)


def needed_rows(losses: Float[Tensor, "row"], risk: Risk, *, seed: int = 0) -> int | None:
    """About how many certify rows a policy with losses like these needs; None where no number would do."""
    rate = float(losses.double().mean())
    if risk.used == "plain":
        return 1 if rate <= risk.epsilon else None
    if rate >= risk.epsilon:
        return None
    if risk.used == "crc":
        return math.ceil((1 - risk.epsilon) / (risk.epsilon - rate))
    if risk.used == "ltt":
        return rows_needed(rate, risk.epsilon, risk.delta)
    return _betting_rows(losses, risk, seed)


def _betting_rows(losses: Float[Tensor, "row"], risk: Risk, seed: int, most: int = 500_000) -> int | None:
    """The same for betting: where most of nine draws of so many rows from these are enough."""

    def enough(rows: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        drawn = losses[torch.randint(len(losses), (9, rows), generator=generator)]
        return float(betting_p(drawn, risk.epsilon, risk.delta, least=risk.least).median()) <= risk.delta

    low, high = 0, 64
    while not enough(high):
        low, high = high, 2 * high
        if high > most:
            return None
    while high - low > max(1, high // 100 if float(losses.abs().max()) else 0):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
