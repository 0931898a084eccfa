"""Fitting `Stopping`: mixtures by cross-entropy, values backwards from the last exit, parts by cross-validation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.calibrate.ladders import ALWAYS, Ladder, PriceLadder, QuotaLadder, SharedLadder, SpendOf
from offramp.calibrate.learned import logistic, multinomial, some_rows
from offramp.calibrate.spend import Spend
from offramp.cost import Budget, CostModel
from offramp.policies import Array, Policy, Stopping
from offramp.policies.stopping import value_features
from offramp.simulate import walk
from offramp.sweep import Sweep
from offramp.trace import ExitTrace

__all__ = [
    "CANDIDATES",
    "Candidate",
    "StoppingFit",
    "choose_stopping",
    "fit_mixture",
    "geometric",
    "unbiased",
    "value_ladder",
]


@dataclass(frozen=True)
class Candidate:
    """One way to make a `Stopping`.

    Args:
        mixture: "own": each exit answers alone. "weights": one weight per exit seen so far. "full": and biases.
        rule: "shared": one threshold on the largest probability. "shares": thresholds from geometric exit shares.
            "value": the value of going on.
    """

    mixture: Literal["own", "weights", "full"] = "own"
    rule: Literal["shared", "shares", "value"] = "shared"


#: The first is max-prob, which another must beat.
CANDIDATES = tuple(
    Candidate(mixture, rule)  # type: ignore[arg-type]
    for mixture in ("own", "weights", "full")
    for rule in ("shared", "shares", "value")
)


#: A bias per class makes Newton's steps quadratic in classes; beyond so many, mixtures have weights alone.
BIAS_CLASSES = 20


@dataclass(frozen=True)
class StoppingFit:
    """How `Stopping` is fitted.

    Args:
        candidates: what is compared; the first is the fall-back.
        folds: of the cross-validation.
        margin: a candidate must beat the fall-back by so many standard errors of their difference over rows.
        ridge: pulls a mixture to the exit's own answer, as sums of squares beside nats.
        budgets: parts of the way from the cheapest exit to the whole model at which candidates are compared.
        seed: of the folds.
    """

    candidates: tuple[Candidate, ...] = CANDIDATES
    folds: int = 5
    margin: float = 1.0
    ridge: float = 1e-2
    budgets: tuple[float, ...] = (0.15, 0.3, 0.45, 0.6, 0.8)
    seed: int = 0


def choose_stopping(
    trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], fit: StoppingFit
) -> tuple[Policy, Ladder]:
    """(the policy that lets every row leave, the ladder) of the candidate that cross-validation prefers."""
    trace.known_labels("Stopping, which is fitted to right and wrong answers,")
    if trace.classes > BIAS_CLASSES:
        fit = replace(fit, candidates=tuple(c for c in fit.candidates if c.mixture != "full"))
    if trace.of_tokens:  # which keep a few words of a vocabulary, too few to mix as they will be
        fit = replace(fit, candidates=tuple(c for c in fit.candidates if c.mixture == "own"))
    best = _preferred(some_rows(trace), costs, flags, fit) if sum(flags) > 1 else fit.candidates[0]
    return _ladder(best, trace, costs, flags, fit)


def fit_mixture(
    trace: ExitTrace, flags: tuple[bool, ...], ridge: float, *, bias: bool
) -> tuple[Float[Tensor, "exit exit"], Float[Tensor, "exit cls"]]:
    """(weights, biases) of every exit's mixture, by cross-entropy with a pull to the exit's own answer."""
    labels, exits, classes = trace.known_labels("a mixture"), trace.exits, trace.classes
    weights, biases = torch.eye(exits), torch.zeros(exits, classes) if bias else unbiased(trace)
    visited = [k for k, on in enumerate(flags) if on]
    said = torch.log_softmax(trace.logits[visited], dim=-1).transpose(0, 1)
    for place, k in enumerate(visited):
        own = torch.zeros(place + 1 + (classes if bias else 0))
        own[place] = 1.0
        inputs = said[:, : place + 1].transpose(1, 2)  # [row cls visit]
        if bias:
            inputs = torch.cat([inputs, torch.eye(classes).expand(trace.rows, classes, classes)], dim=2)
        found = multinomial(inputs, labels, own, 2 * ridge)
        weights[k, visited[: place + 1]] = found[: place + 1]
        if bias:
            biases[k] = found[place + 1 :]
    return weights, biases


def unbiased(trace: ExitTrace) -> Float[Tensor, "exit cls"]:
    """Biases of nothing: of many classes one for all, so that the policy does not ask how many there are."""
    many = trace.of_tokens or trace.classes > BIAS_CLASSES
    return torch.zeros(trace.exits, 1 if many else trace.classes)


def geometric(spend: Spend) -> Callable[[float], Float[Tensor, "visit"]]:
    """Shares of the visited exits proportional to q^k, q from 1e-4 to 1e4 evenly in its logarithm over [-1, 1]."""
    place = torch.arange(1, len(spend.visited) + 1, dtype=torch.float64)
    return lambda knob: torch.softmax(place * knob * 9.2103, dim=0)


def value_ladder(start: Stopping, trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...]) -> PriceLadder:
    """Stopping values for a range of prices.

    Backwards from the last exit: the value of going on from exit k is the estimated chance of being right where the
    continuation would leave, less the price of getting there, regressed on what is known at exit k. Chances of being
    right are smooth estimates, not outcomes, which halves the noise of the regression.
    """
    rows, cumulative = some_rows(trace), costs.cumulative(flags)

    def make(price: float) -> Stopping:
        return replace(start, values=Array(_values(start, rows, cumulative, price)))

    return PriceLadder(trace, flags, make, tuple(0.003 * 1.6**i for i in range(16)))


def _values(start: Stopping, rows: ExitTrace, cumulative: Sequence[float], price: float) -> Float[Tensor, "exit 4"]:
    """v_k of every exit for one price."""
    walked = walk(replace(start, values=None), rows)
    surest, label = walked.answer.max(dim=-1)
    same = torch.cat([torch.zeros_like(label[:1], dtype=torch.bool), label[1:] == label[:-1]])
    seen = value_features(surest, same)
    right = (label == rows.known_labels("the value of going on")).float()
    chance = torch.stack([torch.sigmoid(x @ logistic(x, y)) for x, y in zip(seen, right, strict=True)])
    cost = [cumulative[k] for k in walked.visited]
    values = torch.zeros(rows.exits, 4)
    ahead, paid = chance[-1], torch.full_like(chance[-1], cost[-1])
    for place in range(len(walked.visited) - 2, -1, -1):
        worth = ahead - price * (paid - cost[place]) - chance[place]
        found = _ridge(seen[place], worth)
        values[walked.visited[place]] = found
        goes_on = seen[place] @ found > 0
        ahead = torch.where(goes_on, ahead, chance[place])
        paid = torch.where(goes_on, paid, torch.full_like(paid, cost[place]))
    return values


def _ridge(inputs: Float[Tensor, "row feature"], target: Float[Tensor, "row"], ridge: float = 1e-3) -> Tensor:
    x, y = inputs.double(), target.double()
    pull = ridge * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    pull[0, 0] = 1e-9
    return torch.linalg.solve(x.T @ x + pull, x.T @ y).float()


def _mixtures(
    trace: ExitTrace, flags: tuple[bool, ...], fit: StoppingFit, wanted: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    own = (torch.eye(trace.exits), unbiased(trace))
    rows = some_rows(trace)
    return {
        name: own if name == "own" else fit_mixture(rows, flags, fit.ridge, bias=name == "full")
        for name in dict.fromkeys(wanted)
    }


def _ladder(
    candidate: Candidate, trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], fit: StoppingFit,
    mixture: tuple[Tensor, Tensor] | None = None,
) -> tuple[Policy, Ladder]:  # fmt: skip
    """(the policy that lets every row leave, the ladder) of one candidate on a trace."""
    weights, biases = mixture or _mixtures(trace, flags, fit, [candidate.mixture])[candidate.mixture]
    on = None if all(flags) else flags
    start = Stopping((ALWAYS,) * trace.exits, Array(weights), Array(biases), None, on)
    if candidate.rule == "value":
        return start, value_ladder(start, trace, costs, flags)
    if candidate.rule == "shared":
        return start, SharedLadder.of(start, trace, flags)
    return start, QuotaLadder(start, trace, flags, geometric)


def _preferred(trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], fit: StoppingFit) -> Candidate:
    """The candidate with the best mean accuracy over budgets on rows left out, unless it hardly beats the first."""
    labels = trace.known_labels("Stopping")
    fold = torch.randperm(trace.rows, generator=torch.Generator().manual_seed(fit.seed)) % fit.folds
    least, most = costs.cumulative(flags)[flags.index(True)], 1.0
    budgets = [Budget(fraction=least + part * (most - least)) for part in fit.budgets]
    right = torch.zeros(len(fit.candidates), trace.rows, dtype=torch.float64)
    for number in range(fit.folds):
        out = fold == number
        if not 0 < int(out.sum()) < trace.rows:
            continue
        inside, outside = trace.select(~out), trace.select(out)
        mixtures = _mixtures(inside, flags, fit, [c.mixture for c in fit.candidates])
        sweep = Sweep(outside, costs)
        for place, candidate in enumerate(fit.candidates):
            _, ladder = _ladder(candidate, inside, costs, flags, fit, mixtures[candidate.mixture])
            said = [sweep(ladder.at(_spending(costs, budget))).said for budget in budgets]
            right[place, out] = torch.stack([one == labels[out] for one in said]).double().mean(dim=0)
    gain = right - right[:1]
    mean, error = gain.mean(dim=1), gain.std(dim=1) / max(1, trace.rows) ** 0.5
    good = torch.where(mean > fit.margin * error, mean, torch.zeros_like(mean))
    return fit.candidates[int(good.argmax())]


def _spending(costs: CostModel, budget: Budget) -> SpendOf:
    return lambda flags: Spend(costs, budget, flags)
