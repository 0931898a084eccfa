"""ZTW: exits that see what the exit before said, and answer together."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.policies.arrays import Array
from offramp.policies.base import Evidence, State, Step, as_flags, as_floats, fires
from offramp.policies.mixtures import check_mixture, nothing_mixed

__all__ = ["ZTW", "mixed"]


@dataclass(frozen=True)
class ZTW:
    """Leave at the first exit k with max softmax(E_k) >= thresholds[k], and answer E_k.

        z_k = l_k + V_k log p_{k-1}                      cascade: V_k maps what the visited exit before said
        E_k = mean_{j <= k visited} exp(w_kj) log p_j + b_k      log p_j = log softmax(z_j)

    l_k are exit k's own logits. A linear head over [features, previous logits] is its own logits plus such a product,
    so the cascade is a policy's parameter and needs no other head.

    Args:
        thresholds: one per exit, in probabilities of E_k; or one value for all. The last is not used.
        weights: [E E], row k holds w_k0 .. w_kk; the rest is not used.
        biases: [E cls].
        cascade: [E cls cls], V_0 is not used; None for exits that do not see each other.
        enabled: one flag per exit; None means that all are on. Exits that are off are not in the mean.

    Source: Wolczyk et al. 2021 (Zero Time Waste, NeurIPS), sections 3.1 and 3.2, and the released code. Theirs trains V
    with the heads on training rows, then w and b; ours trains both on rows that the heads have not seen
    (`calibrate(ZTW, ...)`), because heads are surer on rows that they have.
    """

    thresholds: tuple[float, ...] | float
    weights: Array
    biases: Array
    cascade: Array | None = None
    enabled: tuple[bool, ...] | None = None
    needs: ClassVar[tuple[str, ...]] = ()
    per_exit: ClassVar[tuple[str, ...]] = ("thresholds", "enabled")

    def __post_init__(self) -> None:
        check_mixture(self.weights, self.biases, self.cascade, "cascade", "[E cls cls]")
        object.__setattr__(self, "thresholds", as_floats(self.thresholds, "thresholds"))
        object.__setattr__(self, "enabled", as_flags(self.enabled))

    def init(self, seen: Evidence) -> State:
        """(log p of the visited exits, float32 [batch 0 cls],): one is added at each visited exit.

        Raises:
            ShapeError: it was fitted for another number of classes.
        """
        return (nothing_mixed(self, seen),)

    def step(self, k: int, seen: Evidence, state: State) -> Step:
        """Stop where the ensemble of the exits so far is confident enough; its answer are its log-probabilities."""
        (past,) = state
        device = seen.logits.device
        logits = seen.logits.float()
        if self.cascade is not None and past.shape[1]:
            # a product by hand, not `@`, whose last bits depend on how many rows there are
            logits = logits + (self.cascade.tensor(device)[k] * past[:, -1, None, :]).sum(dim=-1)
        said = torch.cat([past, torch.log_softmax(logits, dim=-1)[:, None]], dim=1)
        visited = [j for j in range(k + 1) if j == k or self.enabled is None or self.enabled[j]]
        answer = mixed(said, self.weights.tensor(device)[k][visited], self.biases.tensor(device)[k])
        score = answer.exp().amax(dim=-1)
        return Step(fires(self, k, score), score, answer.to(seen.logits.dtype), (said,))


def mixed(
    said: Float[Tensor, "batch visit cls"], weights: Float[Tensor, "visit"], bias: Float[Tensor, "cls"]
) -> Float[Tensor, "batch cls"]:
    """Log-probabilities of the geometric ensemble: log softmax of mean_j exp(w_j) log p_j + b."""
    return torch.log_softmax((said * weights.exp()[:, None]).mean(dim=1) + bias, dim=-1)
