"""Fitting `Stopping`: mixtures by cross-entropy, gates in hindsight, parts by cross-validation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.calibrate.ladders import ALWAYS, Ladder, PriceLadder, SharedLadder, SpendOf
from offramp.calibrate.learned import gates_backwards, gates_in_hindsight, multinomial, some_rows
from offramp.calibrate.spend import Spend
from offramp.cost import Budget, CostModel
from offramp.policies import Array, Policy, Stopping
from offramp.policies.stopping import surety
from offramp.simulate import walk
from offramp.sweep import Sweep
from offramp.trace import ExitTrace

__all__ = [
    "CANDIDATES",
    "Candidate",
    "StoppingFit",
    "choose_stopping",
    "fit_mixture",
    "stopping_gates",
    "unbiased",
]


@dataclass(frozen=True)
class Candidate:
    """One way to make a `Stopping`.

    Args:
        mixture: "own": each exit answers alone. "weights": one weight per exit seen so far. "full": and biases.
        rule: "shared": one threshold on the largest probability. "hindsight": a gate at every exit, for what would have
            been best. "value": a gate for what going on is worth.
    """

    mixture: Literal["own", "weights", "full"] = "own"
    rule: Literal["shared", "hindsight", "value"] = "shared"


#: What another must beat comes first. Mixtures with one threshold gained little on recorded traces.
CANDIDATES = (
    Candidate("own", "hindsight"),
    Candidate("own", "shared"),  # max-prob
    Candidate("own", "value"),
    Candidate("weights", "hindsight"),
    Candidate("weights", "value"),
    Candidate("full", "hindsight"),
    Candidate("full", "value"),
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


def stopping_gates(
    start: Stopping, trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], rule: Literal["hindsight", "value"]
) -> PriceLadder:
    """Stopping gates for a range of prices, with a loss of 1 for a wrong answer.

    In hindsight every row leaves where it is right at the least price: little noise, but hopeful, as if one knew. By
    value, against what the gates after it reach: noisy, but it sees past an exit that is right by luck alone.
    """
    rows = some_rows(trace)
    walked = walk(replace(start, gates=None), rows)
    wrong = (walked.answer.argmax(dim=-1) != rows.known_labels("the gates of Stopping")).float()
    seen = surety(walked.answer)
    fitted = gates_in_hindsight if rule == "hindsight" else gates_backwards

    def make(price: float) -> Stopping:
        return replace(start, gates=Array(fitted(seen, wrong, costs, flags, price)))

    return PriceLadder(trace, flags, make, tuple(0.003 * 1.6**i for i in range(18)), rungs=60)


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
    if candidate.rule in ("hindsight", "value"):
        return start, stopping_gates(start, trace, costs, flags, candidate.rule)
    return start, SharedLadder.of(start, trace, flags)


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
