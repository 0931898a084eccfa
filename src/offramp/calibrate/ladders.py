"""Ladders: what a family can do on one trace, from the policy that lets every row leave to the one that lets none.

A ladder is made once for a trace and asked for many budgets; what does not depend on the budget is computed once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.calibrate.quotas import Quotas
from offramp.calibrate.spend import WINDOW, Spend
from offramp.calibrate.thresholds import SharedScores
from offramp.policies import Policy
from offramp.policies.base import NEVER
from offramp.simulate import simulate, walk
from offramp.trace import ExitTrace

__all__ = [
    "ALWAYS", "Ladder", "PriceLadder", "QuotaLadder", "RunLadder", "SharedLadder", "SpendOf", "StepLadder",
    "full_thresholds",
]  # fmt: skip

#: Every score is at least this, so that a threshold of ALWAYS lets every row leave.
ALWAYS = -1e6

SpendOf = Callable[[tuple[bool, ...]], Spend]


@runtime_checkable
class Ladder(Protocol):
    """The policies of one family on one trace, by what they spend."""

    @property
    def rungs(self) -> int:
        """How many budgets may be asked for where a whole path of policies is wanted."""
        ...

    def at(self, spend_of: SpendOf) -> Policy:
        """The policy that spends most within a budget; the one that lets every row leave when none is within it.

        Args:
            spend_of: the costs of shares, for exits that are on as given.
        """
        ...


@dataclass(frozen=True)
class SharedLadder:
    """One threshold shared by every exit, raised exit by exit only where ties leave a gap below the budget."""

    start: Any
    flags: tuple[bool, ...]
    scores: SharedScores | None
    visited: tuple[int, ...]
    exits: int
    rungs: int = 200

    @classmethod
    def of(cls, start: Policy, trace: ExitTrace, flags: tuple[bool, ...]) -> "SharedLadder":
        """The ladder of a policy whose thresholds are free."""
        walked = walk(start, trace)
        scores = SharedScores(walked.score[:-1]) if len(walked.visited) > 1 else None
        return cls(start, flags, scores, walked.visited, trace.exits)

    def at(self, spend_of: SpendOf) -> Policy:
        """See `Ladder`."""
        fitted = None if self.scores is None else self.scores.fit(spend_of(self.flags))
        if fitted is None:
            return self.start
        return replace(self.start, thresholds=full_thresholds(fitted.thresholds, self.visited, self.exits))


@dataclass(frozen=True)
class QuotaLadder:
    """Thresholds by sequential quotas; the shares depend on one number that is found for the budget.

    An exit whose quota is no row is switched off, and the shares are found again without the cost of its head.

    Args:
        start: the policy that lets every row leave.
        shares_for: from what shares cost to a function of a number in [-1, 1] that gives the shares of the visited
            exits; a larger number costs more.
    """

    start: Any
    trace: ExitTrace
    flags: tuple[bool, ...]
    shares_for: Callable[[Spend], Callable[[float], Float[Tensor, "visit"]]]
    rungs: int = 60
    _kept: dict[tuple[bool, ...], tuple[Quotas, tuple[int, ...]]] = field(default_factory=dict, compare=False)

    def at(self, spend_of: SpendOf) -> Policy:
        """See `Ladder`."""
        flags, found = self.flags, self.start
        while sum(flags) > 1:
            quotas, visited = self._quotas(flags)
            spend = spend_of(flags)
            made = quotas.within(spend, self.shares_for(spend))
            if made is None:
                return found
            thresholds, on = made
            enabled = list(flags)
            for k, flag in zip(visited, on, strict=False):
                enabled[k] = flag
            flags = tuple(enabled)
            found = replace(
                self.start,
                thresholds=full_thresholds(thresholds, visited, self.trace.exits),
                enabled=None if all(flags) else flags,
            )
            if all(on):
                break
        return found

    def _quotas(self, flags: tuple[bool, ...]) -> tuple[Quotas, tuple[int, ...]]:
        if flags not in self._kept:
            walked = walk(replace(self.start, enabled=flags), self.trace)
            self._kept[flags] = (Quotas(walked.score[:-1]), walked.visited)
        return self._kept[flags]


@dataclass(frozen=True)
class PriceLadder:
    """Policies fitted for a range of prices; the nearest below a budget has its thresholds moved to use it up.

    Args:
        make: from a price to a policy that lets every row leave, and that meets the price at thresholds of 0.
        prices: rising; a higher one spends less.
    """

    trace: ExitTrace
    flags: tuple[bool, ...]
    make: Callable[[float], Any]
    prices: tuple[float, ...]
    rungs: int = 100
    _made: dict[int, tuple[SharedLadder, tuple[float, ...]]] = field(default_factory=dict, compare=False)

    def at(self, spend_of: SpendOf) -> Policy:
        """See `Ladder`."""
        spend = spend_of(self.flags)
        low, high = 0, len(self.prices) - 1
        while low < high:
            middle = (low + high) // 2
            if spend.mean(self._rung(middle)[1]) <= spend.amount:
                high = middle
            else:
                low = middle + 1
        return self._rung(low)[0].at(spend_of)

    def start(self) -> Policy:
        """The policy of the lowest price that lets every row leave."""
        return self._rung(0)[0].start

    def _rung(self, index: int) -> tuple[SharedLadder, tuple[float, ...]]:
        """(the ladder of the policy for a price, the shares with thresholds of 0)."""
        if index not in self._made:
            ladder = SharedLadder.of(self.make(self.prices[index]), self.trace, self.flags)
            shares = (1.0,) if ladder.scores is None else ladder.scores.shares_at(0.0)
            self._made[index] = (ladder, shares)
        return self._made[index]


@dataclass(frozen=True)
class StepLadder:
    """A few policies, simulated once: the dearest that is within the budget."""

    policies: tuple[Policy, ...]
    shares: tuple[tuple[float, ...], ...]
    flags: tuple[tuple[bool, ...], ...]

    @classmethod
    def of(cls, policies: Sequence[Policy], trace: ExitTrace, costs: Any) -> "StepLadder":
        """The ladder of these policies, the first of which lets every row leave."""
        outcomes = [simulate(policy, trace, costs).shares for policy in policies]
        return cls(tuple(policies), tuple(outcomes), tuple(costs.visited(p.enabled) for p in policies))

    @property
    def rungs(self) -> int:
        """See `Ladder`."""
        return 4 * len(self.policies)

    def at(self, spend_of: SpendOf) -> Policy:
        """See `Ladder`."""
        best, most = self.policies[0], -1.0
        for policy, shares, flags in zip(self.policies, self.shares, self.flags, strict=True):
            spend = spend_of(flags)
            cost = spend.costs.spent(shares, spend.budget, flags)
            if most < cost <= spend.limit:
                best, most = policy, cost
        return best


@dataclass(frozen=True)
class RunLadder:
    """Policies that count exits in a row with a score past tau (PCEE, F-PABEE): tau for the budget, for every count.

    A row leaves after m exits in a row past tau, so at one threshold on the smallest score of the last m. Among the
    counts that use the budget up, the one that is most often right on the trace is taken; where none does, the one that
    spends most. Without classes to be right about, the smallest count.
    """

    start: Any
    flags: tuple[bool, ...]
    runs: tuple[tuple[int, SharedScores], ...]
    right: Tensor | None  # bool [visit row]
    make: Callable[[int, float], Policy]
    rungs: int = 100

    @classmethod
    def of(
        cls, start: Policy, trace: ExitTrace, flags: tuple[bool, ...], scores: Float[Tensor, "visit row"],
        make: Callable[[int, float], Policy], counts: Sequence[int],
    ) -> "RunLadder":  # fmt: skip
        """The ladder over some counts, of the scores of every visited exit (the last is not used)."""
        visited = [k for k, on in enumerate(flags) if on]
        right = None
        if getattr(start, "task", "classes") == "classes":
            right = trace.logits[visited].argmax(dim=-1) == trace.known_labels(type(start).__name__)
        runs = tuple((m, SharedScores(_lowest_of(scores[:-1], m))) for m in counts if m <= len(scores) - 1)
        return cls(start, flags, runs, right, make)

    def at(self, spend_of: SpendOf) -> Policy:
        """See `Ladder`."""
        spend, found = spend_of(self.flags), []
        for count, scores in self.runs:
            fitted = scores.fit(spend, apart=False)
            if fitted is None:
                continue
            right = 0.0
            if self.right is not None:
                stop = torch.cat([scores.scores >= fitted.thresholds[0], torch.ones_like(self.right[:1])])
                right = float(self.right.gather(0, stop.int().argmax(dim=0)[None]).double().mean())
            used_up = fitted.cost >= WINDOW * spend.amount
            found.append((used_up, right if used_up else fitted.cost, -count, fitted.thresholds[0]))
        if not found:
            return self.start
        _, _, count, tau = max(found)
        return self.make(-count, tau)


def full_thresholds(early: Sequence[float], visited: Sequence[int], exits: int) -> tuple[float, ...]:
    """One threshold per exit from those of the early visited exits; exits that are off repeat the last of them."""
    full = [early[-1]] * exits
    for k, threshold in zip(visited, early, strict=False):
        full[k] = threshold
    return tuple(full)


def _lowest_of(scores: Float[Tensor, "early row"], count: int) -> Float[Tensor, "early row"]:
    """The smallest of the last `count` scores at every exit; before there are so many, one that is never enough."""
    never = torch.full_like(scores[:1], 10 * NEVER)
    windows = [torch.cat([never.expand(shift, -1), scores[: len(scores) - shift]]) for shift in range(count)]
    return torch.stack(windows).amin(dim=0)
