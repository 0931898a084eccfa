"""Optimal stopping: answers mixed from all exits seen so far, and leaving where going on is not worth its price."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.policies.arrays import Array
from offramp.policies.base import Evidence, State, Step, as_flags, as_floats, fires
from offramp.policies.mixtures import check_mixture, nothing_mixed

__all__ = ["Stopping", "mix", "value_features"]

#: Log-odds of the largest probability are cut at this, so that no row is infinitely sure.
SUREST = 8.0


@dataclass(frozen=True)
class Stopping:
    """Leave at the first exit k with score_k >= thresholds[k], and answer m_k, mixed from the exits seen so far.

        m_k     = log softmax(sum_{j <= k visited} w_kj log p_j + b_k)
        score_k = max softmax(m_k)                                     without `values`
        score_k = -(v_k . [1, s_k, s_k^2, same_k])                     with them

    s_k is the log-odds of the largest probability of m_k, over 3, and same_k is 1 where m_k has the label of the
    mixture before. v_k . [...] estimates what going on is worth: the accuracy that the best continuation gains, less
    its price.

    Args:
        thresholds: one per exit, in units of the score; or one value for all. The last is not used.
        weights: [E E], row k holds w_k0 .. w_kk; the rest is not used. The unit matrix answers with each exit's own.
        biases: [E cls], or [E 1] of a policy for any number of classes, such as of a vocabulary.
        values: [E 4], or None.
        enabled: one flag per exit; None means that all are on. Exits that are off are not in the mixture.

    Source: ours. `calibrate(Stopping, ...)` chooses by cross-validation which parts are worth having, and falls back to
    max-prob where none is.
    """

    thresholds: tuple[float, ...] | float
    weights: Array
    biases: Array
    values: Array | None = None
    enabled: tuple[bool, ...] | None = None
    needs: ClassVar[tuple[str, ...]] = ()
    per_exit: ClassVar[tuple[str, ...]] = ("thresholds", "enabled")

    def __post_init__(self) -> None:
        check_mixture(self.weights, self.biases, self.values, "values", "[E 4]")
        object.__setattr__(self, "thresholds", as_floats(self.thresholds, "thresholds"))
        object.__setattr__(self, "enabled", as_flags(self.enabled))
        cpu = torch.device("cpu")
        weights, biases = self.weights.tensor(cpu), self.biases.tensor(cpu)
        alone = (weights == torch.eye(len(weights))).all(1) & (biases == 0).all(1)
        object.__setattr__(self, "_alone", tuple(alone.tolist()))  # exits that answer alone, with nothing to mix

    def init(self, seen: Evidence) -> State:
        """(log p of the visited exits, float32 [batch 0 cls]; the label of the mixture before, int64 [batch]).

        Raises:
            ShapeError: it was fitted for another number of classes.
        """
        return nothing_mixed(self, seen), torch.full_like(seen.logits[:, 0], -1, dtype=torch.int64)

    def step(self, k: int, seen: Evidence, state: State) -> Step:
        """Stop where the mixture is sure enough, or where going on is not worth its price."""
        past, before = state
        device = seen.logits.device
        answer = torch.log_softmax(seen.logits.float(), dim=-1)
        said = torch.cat([past, answer[:, None]], dim=1)
        if not self._alone[k]:  # type: ignore[attr-defined]
            visited = [j for j in range(k + 1) if j == k or self.enabled is None or self.enabled[j]]
            answer = mix(said, self.weights.tensor(device)[k][visited], self.biases.tensor(device)[k])
        surest, label = answer.max(dim=-1)
        if self.values is None:
            score = surest.exp()
        else:
            score = -(value_features(surest, label == before) * self.values.tensor(device)[k]).sum(dim=-1)
        return Step(fires(self, k, score), score, answer.to(seen.logits.dtype), (said, label))


def mix(
    said: Float[Tensor, "batch visit cls"], weights: Float[Tensor, "visit"], bias: Float[Tensor, "#cls"]
) -> Float[Tensor, "batch cls"]:
    """Log-probabilities of weighted log-probabilities: log softmax of sum_j w_j log p_j + b."""
    return torch.log_softmax((said * weights[:, None]).sum(dim=1) + bias, dim=-1)


def value_features(surest: Float[Tensor, "*batch"], same: Tensor) -> Float[Tensor, "*batch 4"]:
    """[1, s, s^2, same] from the largest log-probability, s its log-odds over 3."""
    odds = surest - torch.log(-torch.expm1(surest.clamp(max=-1e-6)))
    s = odds.clamp(-SUREST, SUREST) / 3
    return torch.stack([torch.ones_like(s), s, s * s, same.to(s.dtype)], dim=-1)
