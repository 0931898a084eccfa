"""EENet: learned exit scores, with thresholds from learned exit shares."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from offramp.errors import ShapeError, ValueRangeError
from offramp.policies.arrays import Array
from offramp.policies.base import Evidence, State, Step, as_flags, as_floats, fires
from offramp.scores import probabilities

__all__ = ["EENet", "features", "raw_score"]


@dataclass(frozen=True)
class EENet:
    """Leave at the first exit k with score_k >= thresholds[k], the score being learned.

        a_k     = [p_k, max p_k, 1 + sum_c p_kc log p_kc / log cls, vote_k if wanted, q of the visited exits before k]
        vote_k  = (largest number of equal predictions among the exits visited so far) / (their number)
        score_k = w_k . a_k                             (scorer="linear")
        score_k = W2 sigmoid(W1 a_k + b1) + b2          (scorer="mlp")
        q_k     = clamp(score_k, 0, 1)  or  sigmoid(score_k)

    q_k estimates the chance that exit k is right; it is what later exits see. The threshold is compared with the
    score before the clamp, because after it many rows tie at 1.0 and a quota cannot split a tie.

    Args:
        scorers: per exit the parameters: (w,) for linear, (W1, b1, W2, b2) for mlp. Made by `calibrate(EENet, ...)`.
        thresholds: one per exit, in units of the score. The last is not used.
        scorer: the form of the score.
        class_scores: whether p_k is among the features (leave it out when there are very many classes).
        enabled: one flag per exit; None means that all are on. A feature q exists only for exits that are on.
        votes: whether vote_k is among the features.

    Source: Ilhan et al. 2024 (EENet, arXiv 2301.07099), section 3, and the authors' code. Theirs clamps past scores in
    training only, and a row whose last score is negative leaves nowhere; ours clamps alike in both, and the last exit
    takes every row that is left.
    """

    scorers: tuple[tuple[Array, ...], ...]
    thresholds: tuple[float, ...] | float
    scorer: Literal["linear", "mlp"] = "linear"
    class_scores: bool = True
    enabled: tuple[bool, ...] | None = None
    votes: bool = False
    needs: ClassVar[tuple[str, ...]] = ()
    per_exit: ClassVar[tuple[str, ...]] = ("scorers", "thresholds", "enabled")

    def __post_init__(self) -> None:
        if self.scorer not in ("linear", "mlp"):
            raise ValueRangeError(f"scorer is {self.scorer!r}; expected 'linear' or 'mlp'.")
        parts = {"linear": 1, "mlp": 4}[self.scorer]
        scorers = tuple(tuple(part) for part in self.scorers)
        if not scorers or any(len(part) != parts for part in scorers):
            raise ShapeError(
                f"scorers of a {self.scorer} EENet need {parts} array(s) per exit; got {len(scorers)} exits."
            )
        for k, part in enumerate(scorers):
            _check_scorer(part, f"scorers[{k}]")
        if not isinstance(self.class_scores, bool) or not isinstance(self.votes, bool):
            raise ValueRangeError(
                f"class_scores and votes are {self.class_scores!r}, {self.votes!r}; expected True or False."
            )
        object.__setattr__(self, "scorers", scorers)
        object.__setattr__(self, "thresholds", as_floats(self.thresholds, "thresholds"))
        object.__setattr__(self, "enabled", as_flags(self.enabled))

    def init(self, seen: Evidence) -> State:
        """(q float [batch 0],): one column is added at each visited exit; and counts [batch cls] with votes."""
        past = seen.logits[:, :0].float()
        return (past, torch.zeros_like(seen.logits, dtype=torch.float32)) if self.votes else (past,)

    def step(self, k: int, seen: Evidence, state: State) -> Step:
        """Stop where the learned score is at least the threshold of exit k."""
        past, *counts = state
        if self.votes:
            counts = [counts[0] + F.one_hot(seen.logits.argmax(dim=-1), seen.logits.shape[-1])]
        vote = counts[0].amax(dim=-1, keepdim=True) / (past.shape[-1] + 1) if self.votes else None
        seen_here = features(seen.logits, past, self.class_scores, vote)
        weights = tuple(part.tensor(seen.logits.device) for part in self.scorers[k])
        expected = weights[0].shape[-1]
        if seen_here.shape[-1] != expected:
            raise ShapeError(
                f"EENet's scorer at exit {k} expects {expected} features, got {seen_here.shape[-1]}. "
                "It was fitted for another number of classes, or with other exits switched on: calibrate again."
            )
        score = raw_score(seen_here, weights)
        q = score.clamp(0, 1) if self.scorer == "linear" else score.sigmoid()
        return Step(fires(self, k, score), score, seen.logits, (torch.cat([past, q[:, None]], dim=-1), *counts))


def _check_scorer(part: tuple[Array, ...], what: str) -> None:
    """Nothing, when the arrays of one exit's scorer fit each other."""
    if not all(isinstance(array, Array) for array in part):
        raise ShapeError(f"{what} holds {[type(array).__name__ for array in part]}; expected Array objects.")
    shapes = [tuple(array.shape) for array in part]
    hidden = shapes[0][:1]
    if len(part) == 1:
        fits = len(shapes[0]) == 1
    else:
        fits = len(shapes[0]) == 2 and shapes[1:] == [hidden, hidden, ()]
    if not fits:
        expected = "[feature]" if len(part) == 1 else "[hidden, feature], [hidden], [hidden], []"
        raise ShapeError(f"{what} has shapes {shapes}; expected {expected}.")


def features(
    logits: Float[Tensor, "batch cls"],
    past: Float[Tensor, "batch q"],
    class_scores: bool,
    vote: Float[Tensor, "batch 1"] | None = None,
) -> Float[Tensor, "batch feature"]:
    """a_k of one exit: [p (unless class_scores is off), max p, 1 - normalised entropy, vote if given, past q].

    Raises:
        ValueRangeError: there is only one class, whose entropy is always 0.
    """
    if logits.shape[-1] < 2:
        raise ValueRangeError(f"EENet's features of {logits.shape[-1]} class say nothing; expected at least 2 classes.")
    p = probabilities(logits)
    log_p = torch.log_softmax(logits.float(), dim=-1)
    certainty = 1.0 + (p * log_p).sum(dim=-1, keepdim=True) / math.log(p.shape[-1])
    parts = [p] if class_scores else []
    votes = [] if vote is None else [vote]
    return torch.cat([*parts, p.amax(dim=-1, keepdim=True), certainty, *votes, past.float()], dim=-1)


def raw_score(seen: Float[Tensor, "batch feature"], weights: tuple[Tensor, ...]) -> Float[Tensor, "batch"]:
    """The score before the clamp: linear for one array, a network with one hidden layer for four."""
    if len(weights) == 1:
        return (seen * weights[0]).sum(dim=-1)  # not `@`, whose last bits depend on how many rows there are
    first, first_bias, second, second_bias = weights
    hidden = torch.sigmoid((seen[:, None, :] * first).sum(dim=-1) + first_bias)
    return (hidden * second).sum(dim=-1) + second_bias
