"""Optimal stopping: answers mixed from all exits seen so far, and leaving where going on is not worth its price."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.policies.arrays import Array
from offramp.policies.base import Evidence, State, Step, as_flags, as_floats, fires
from offramp.policies.mixtures import check_mixture, nothing_mixed

__all__ = ["Stopping", "mix", "surety"]


@dataclass(frozen=True)
class Stopping:
    """Leave at the first exit k with score_k >= thresholds[k], and answer m_k, mixed from the exits seen so far.

        m_k     = log softmax(sum_{j <= k visited} w_kj log p_j + b_k)
        score_k = c_k                                   without `gates`, c_k the largest probability of m_k
        score_k = g_k . [1, c_k, c_k^2, c_k - d_k]      with them, d_k the second largest

    A gate estimates, in log-odds, whether leaving here is as good as leaving later: whether no later exit is worth its
    price to this row.

    Args:
        thresholds: one per exit, in units of the score; or one value for all. The last is not used.
        weights: [E E], row k holds w_k0 .. w_kk; the rest is not used. The unit matrix answers with each exit's own.
        biases: [E cls], or [E 1] of a policy for any number of classes, such as of a vocabulary.
        gates: [E 4], or None.
        enabled: one flag per exit; None means that all are on. Exits that are off are not in the mixture.

    Source: ours; the gates are JEI-DNN's idea, fitted to right and wrong answers. `calibrate(Stopping, ...)` chooses by
    cross-validation between kinds of mixtures and of gates, and max-prob.
    """

    thresholds: tuple[float, ...] | float
    weights: Array
    biases: Array
    gates: Array | None = None
    enabled: tuple[bool, ...] | None = None
    needs: ClassVar[tuple[str, ...]] = ()
    per_exit: ClassVar[tuple[str, ...]] = ("thresholds", "enabled")

    def __post_init__(self) -> None:
        check_mixture(self.weights, self.biases, self.gates, "gates", "[E 4]")
        object.__setattr__(self, "thresholds", as_floats(self.thresholds, "thresholds"))
        object.__setattr__(self, "enabled", as_flags(self.enabled))
        cpu = torch.device("cpu")
        weights, biases = self.weights.tensor(cpu), self.biases.tensor(cpu)
        alone = ((weights == torch.eye(len(weights))).all(1) & (biases == 0).all(1)).tolist()
        object.__setattr__(self, "_alone", tuple(alone))  # exits that answer alone, with nothing to mix
        last = max((k for k, by_itself in enumerate(alone) if not by_itself), default=-1)
        object.__setattr__(self, "_mixed_until", last)  # behind it nobody asks what exits said before

    def init(self, seen: Evidence) -> State:
        """(log p of the visited exits that a later one mixes, float32 [batch 0 cls],).

        Raises:
            ShapeError: it was fitted for another number of classes.
        """
        return (nothing_mixed(self, seen),)

    def step(self, k: int, seen: Evidence, state: State) -> Step:
        """Stop where the mixture is sure enough, or where its gate opens."""
        (past,) = state
        device = seen.logits.device
        answer = torch.log_softmax(seen.logits.float(), dim=-1)
        asked = k <= self._mixed_until  # type: ignore[attr-defined]
        said = torch.cat([past, answer[:, None]], dim=1) if asked else past[:, :0]
        if not self._alone[k]:  # type: ignore[attr-defined]
            visited = [j for j in range(k + 1) if j == k or self.enabled is None or self.enabled[j]]
            answer = mix(said, self.weights.tensor(device)[k][visited], self.biases.tensor(device)[k])
        if self.gates is None:
            score = answer.amax(dim=-1).exp()
        else:
            score = (surety(answer) * self.gates.tensor(device)[k]).sum(dim=-1)
        return Step(fires(self, k, score), score, answer.to(seen.logits.dtype), (said,))


def mix(
    said: Float[Tensor, "batch visit cls"], weights: Float[Tensor, "visit"], bias: Float[Tensor, "#cls"]
) -> Float[Tensor, "batch cls"]:
    """Log-probabilities of weighted log-probabilities: log softmax of sum_j w_j log p_j + b."""
    return torch.log_softmax((said * weights[:, None]).sum(dim=1) + bias, dim=-1)


def surety(answer: Float[Tensor, "*batch cls"]) -> Float[Tensor, "*batch 4"]:
    """[1, c, c^2, c - d] of log-probabilities: c is the largest probability and d the second largest, 0 of one class.
    Both are known of tokens, too, whose traces keep a few words of a vocabulary."""
    if answer.shape[-1] > 1:
        first, second = answer.topk(2, dim=-1).values.exp().unbind(dim=-1)
    else:
        first = answer[..., 0].exp()
        second = torch.zeros_like(first)
    return torch.stack([torch.ones_like(first), first, first * first, first - second], dim=-1)
