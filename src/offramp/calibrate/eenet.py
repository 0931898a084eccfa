"""EENet's fit: exit scores and exit shares learned together for a budget, then thresholds from quotas."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from offramp.calibrate.quotas import Quotas
from offramp.calibrate.spend import Spend
from offramp.errors import DataError, ValueRangeError
from offramp.policies.arrays import Array
from offramp.policies.base import visits
from offramp.policies.eenet import EENet, features
from offramp.simulate import walk
from offramp.trace import ExitTrace

__all__ = ["EENetFit", "blank_eenet", "fit_eenet"]

TINY = 1e-6


@dataclass(frozen=True)
class EENetFit:
    """How EENet's scores and shares are fitted.

    Args:
        scorer: "linear", or "mlp" with one hidden layer.
        class_scores: whether the class probabilities are features. With many classes leave them out.
        votes: whether the share of equal predictions so far is a feature.
        width: hidden width of the share network and of the mlp scorer, as a multiple of the features.
        weight_ce: a_ce, the weight of KL(scores || shares).
        weight_cost: a_cost, the weight of the distance from the budget.
        power: b, the power of the scores in that KL.
        steps, lr: of Adam on all rows at once.
        max_rows: rows beyond that are left out of the fit of scores (not of the thresholds), by seed.
        seed: of the initial share network.

    Source: Ilhan et al. 2024 (EENet), section 3, and the authors' code. Theirs takes mini-batches, lr 3e-5 and 1,000
    epochs; ours starts every score at max-prob and needs seconds.
    """

    scorer: Literal["linear", "mlp"] = "linear"
    class_scores: bool = True
    votes: bool = False
    width: float = 0.5
    weight_ce: float = 1e-3
    weight_cost: float = 1e-2
    power: float = 1.0
    steps: int = 150
    lr: float = 2e-2
    max_rows: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        positive = min(self.steps, self.lr, self.width, self.max_rows) > 0
        if self.scorer not in ("linear", "mlp") or not positive:
            raise ValueRangeError(f"{self!r}: scorer is 'linear' or 'mlp'; steps, lr, width and max_rows are above 0.")


def fit_eenet(
    trace: ExitTrace,
    spend_of: Callable[[tuple[bool, ...]], Spend],
    fit: EENetFit,
    enabled: tuple[bool, ...] | None = None,
) -> EENet:
    """The EENet policy whose simulated mean cost on the trace is the largest found that is at most the budget.

    An exit whose quota is no row is switched off and the scores are fitted again without it, because its score is a
    feature of later exits.

    Raises:
        DataError: no labels.
        ValueRangeError: an mlp with the class scores of more than 256 classes.
    """
    if trace.labels is None:
        raise DataError("EENet's scores are fitted to right and wrong answers, and this trace has no labels.")
    if fit.scorer == "mlp" and fit.class_scores and trace.classes > 256:
        raise ValueRangeError(f"an mlp over {trace.classes} class scores is too large; use class_scores=False.")
    flags = enabled or (True,) * trace.exits
    while True:
        policy, shares = _fit_scores(trace, spend_of(flags), fit, flags)
        policy, on = _fit_thresholds(policy, trace, spend_of(flags), shares)
        if on == flags:
            return policy
        flags = on


def blank_eenet(exits: int, classes: int, enabled: tuple[bool, ...]) -> EENet:
    """An EENet that has learned nothing: its score is each exit's max-prob, and its thresholds let every row leave."""
    scorers = []
    for k in range(exits):
        past = sum(enabled[:k])
        scorers.append((Array([0.0] * classes + [1.0, 0.0] + [0.0] * past),))
    return EENet(tuple(scorers), (-1.0,) * exits, enabled=enabled)


def _fit_scores(
    trace: ExitTrace, spend: Spend, fit: EENetFit, flags: tuple[bool, ...]
) -> tuple[EENet, tuple[float, ...]]:
    generator = torch.Generator().manual_seed(fit.seed)
    probe = EENet(scorers=((Array([0.0]),),), thresholds=0.0, enabled=flags)
    visited = visits(probe, trace.exits)
    rows = torch.randperm(trace.rows, generator=generator)[: fit.max_rows]
    logits = trace.logits[list(visited)][:, rows]
    right = (logits.argmax(dim=-1) == trace.known_labels("EENet")[rows]).float()
    own = torch.stack(
        [features(z, z[:, :0], fit.class_scores, v).T for z, v in zip(logits, _votes(logits, fit), strict=True)]
    )
    width, count = own.shape[1], len(visited)
    # Every exit's features, one row of the trace per column, and a 1 for biases. Those of q change with the scores.
    inputs = torch.cat([own, torch.zeros(count, count - 1, rows.numel()), torch.ones(count, 1, rows.numel())], dim=1)
    scorers = [_start(width, i, fit, trace.classes, generator) for i in range(count)]
    sharers = _Networks([_network(width + i, fit.width, generator) for i in range(count)], inputs.shape[1])
    scores: _Linears | _Networks = (_Linears if fit.scorer == "linear" else _Networks)(scorers, inputs.shape[1])
    parameters = [*scores.parameters, *sharers.parameters]
    optimizer = torch.optim.Adam(parameters, lr=fit.lr)
    cost = torch.tensor(spend.cumulative, dtype=torch.float32)
    for _ in range(fit.steps):
        loss, _ = _objective(inputs, right, scores, sharers, cost, spend.amount, fit)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        _, shares = _objective(inputs, right, scores, sharers, cost, spend.amount, fit)
    found = iter(scores.each())
    blank = tuple(Array(torch.zeros_like(p)) for p in scorers[0])
    made = tuple(tuple(map(Array, next(found))) if k in visited else blank for k in range(trace.exits))
    policy = EENet(made, (0.0,) * trace.exits, fit.scorer, fit.class_scores, flags, fit.votes)
    return policy, tuple(shares.double().mean(dim=1).tolist())


def _votes(logits: Float[Tensor, "visit row cls"], fit: EENetFit) -> list[Tensor | None]:
    """vote_k [row 1] of every exit, or None for each."""
    if not fit.votes:
        return [None] * len(logits)
    counts = F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float().cumsum(dim=0)
    return [count.amax(dim=-1, keepdim=True) / (k + 1) for k, count in enumerate(counts)]


def _objective(
    inputs: Float[Tensor, "visit feature row"],
    right: Float[Tensor, "visit row"],
    scorers: "_Linears | _Networks",
    sharers: "_Networks",
    cost: Float[Tensor, "visit"],
    budget: float,
    fit: EENetFit,
) -> tuple[Tensor, Float[Tensor, "visit row"]]:
    """(J, shares pi): weighted BCE of the scores, KL of scores to shares, and the distance from the budget.

    The features of q in `inputs` are overwritten. No gradient passes through them, so all exits are computed at once.
    """
    squash = torch.sigmoid if fit.scorer == "mlp" else _unit
    exits = len(inputs)
    with torch.no_grad():
        for k in range(exits - 1):
            column = inputs.shape[1] - exits + k
            inputs[k + 1 :, column] = squash(scorers.one(k, inputs[k]))
    scores = squash(scorers.all(inputs))
    log_pi = torch.log_softmax(torch.sigmoid(sharers.all(inputs)), dim=0)
    pi = log_pi.exp()
    weights = (pi / pi.sum(dim=1, keepdim=True)).detach()
    likelihood = 1 - (scores.clamp(TINY, 1 - TINY) - right).abs()  # q where the exit is right, 1 - q where it is wrong
    bce = -(weights * likelihood.log()).sum() / exits
    powered = scores.detach().clamp_min(TINY) ** fit.power  # a row whose scores are all 0 would divide by 0
    qhat = powered / powered.sum(dim=0, keepdim=True)
    kl = (qhat * (qhat.log() - log_pi)).sum() / pi.shape[1]
    spent = cost @ pi.mean(dim=1)
    return bce + fit.weight_ce * kl + fit.weight_cost * (spent - budget).abs() / budget, pi


def _unit(raw: Tensor) -> Tensor:
    return raw.clamp(0, 1)


class _Linears:
    """One linear score per exit, computed together. Weights of features that an exit lacks stay 0."""

    def __init__(self, parts: list[tuple[Tensor, ...]], features: int) -> None:
        self.features = [len(w) for (w,) in parts]
        self.weight = torch.stack([F.pad(w, (0, features - 1 - len(w))) for (w,) in parts]).requires_grad_()
        self.parameters = [self.weight]

    def all(self, inputs: Float[Tensor, "visit feature row"]) -> Float[Tensor, "visit row"]:
        return torch.bmm(self.weight[:, None], inputs[:, :-1])[:, 0]

    def one(self, k: int, inputs: Float[Tensor, "feature row"]) -> Float[Tensor, "row"]:
        return self.weight[k] @ inputs[:-1]

    def each(self) -> list[tuple[Tensor, ...]]:
        return [(w[:n],) for w, n in zip(self.weight.detach(), self.features, strict=True)]


class _Networks:
    """One network with one hidden layer per exit, computed together. Padding stays 0: see `mask`."""

    def __init__(self, parts: list[tuple[Tensor, ...]], features: int) -> None:
        self.shapes = [tuple(first.shape) for first, *_ in parts]
        hidden = max(h for h, _ in self.shapes)
        self.first = torch.zeros(len(parts), hidden, features)  # the last column is the bias
        self.second = torch.zeros(len(parts), 1, hidden)
        self.second_bias = torch.stack([bias for *_, bias in parts])[:, None]
        self.mask = torch.zeros(len(parts), 1, hidden)  # a padded unit, sigmoid(0), would learn an output weight
        for k, ((first, first_bias, second, _), (h, f)) in enumerate(zip(parts, self.shapes, strict=True)):
            self.first[k, :h, :f], self.first[k, :h, -1] = first, first_bias
            self.second[k, 0, :h], self.mask[k, 0, :h] = second, 1.0
        self.parameters = [self.first, self.second, self.second_bias]
        for parameter in self.parameters:
            parameter.requires_grad_()

    def all(self, inputs: Float[Tensor, "visit feature row"]) -> Float[Tensor, "visit row"]:
        hidden = torch.bmm(self.first, inputs).sigmoid_()
        return torch.bmm(self.second * self.mask, hidden)[:, 0] + self.second_bias

    def one(self, k: int, inputs: Float[Tensor, "feature row"]) -> Float[Tensor, "row"]:
        hidden = (self.first[k] @ inputs).sigmoid_()
        return (self.second[k, 0] * self.mask[k, 0]) @ hidden + self.second_bias[k]

    def each(self) -> list[tuple[Tensor, ...]]:
        first, second, bias = (p.detach() for p in self.parameters)
        return [
            (first[k, :h, :f], first[k, :h, -1], second[k, 0, :h], bias[k, 0]) for k, (h, f) in enumerate(self.shapes)
        ]


def _start(width: int, past: int, fit: EENetFit, classes: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The initial parameters of one scorer; a linear one starts as max-prob."""
    if fit.scorer == "mlp":
        return _network(width + past, fit.width, generator)
    weight = torch.zeros(width + past)
    weight[classes if fit.class_scores else 0] = 1.0
    return (weight,)


def _network(inputs: int, rate: float, generator: torch.Generator) -> tuple[Tensor, ...]:
    hidden = max(2, round(rate * inputs))
    first = torch.randn(hidden, inputs, generator=generator) / inputs**0.5
    second = torch.randn(hidden, generator=generator) / hidden**0.5
    return first, torch.zeros(hidden), second, torch.zeros(())


def _fit_thresholds(
    policy: EENet, trace: ExitTrace, spend: Spend, shares: tuple[float, ...]
) -> tuple[EENet, tuple[bool, ...]]:
    """Quotas of the learned shares, tilted towards cheap or dear exits until the simulated cost meets the budget.

    The shares' own cost misses the budget: a softmax of sigmoids cannot leave a narrow band, and quotas are floors.
    """
    scores = walk(policy, trace).score[:-1]
    base = torch.tensor(shares, dtype=torch.float64).clamp_min(1e-12).log()
    cost = torch.tensor(spend.cumulative, dtype=torch.float64) / spend.cumulative[-1]

    def tilted(knob: float) -> Tensor:
        return torch.softmax(base + 200.0 * knob * cost, dim=0)

    best = Quotas(scores).within(spend, tilted) if scores.numel() else None
    visited = visits(policy, trace.exits)
    flags = list(policy.enabled or (True,) * trace.exits)
    full = [0.0] * trace.exits
    always = (float(scores.min()),) * len(scores) if scores.numel() else ()
    thresholds, on = best or (always, (True,) * len(scores))
    for k, threshold, flag in zip(visited, thresholds, on, strict=False):
        full[k], flags[k] = threshold, flag
    return replace(policy, thresholds=tuple(full), enabled=tuple(flags)), tuple(flags)
