"""JEI-DNN: a small learned gate at every exit."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.errors import ShapeError, ValueRangeError
from offramp.policies.arrays import Array
from offramp.policies.base import Evidence, State, Step, as_flags, as_floats, fires

__all__ = ["JEIDNN", "gate_features"]


@dataclass(frozen=True)
class JEIDNN:
    """Leave at the first exit k whose gate opens: w_k . [c, entropy, margin, entropy(p^g)] + b_k >= thresholds[k].

    c = max p; entropies are normalised to [0, 1]; p^g is p with its probabilities raised to g and normalised again. The
    gate's sigmoid is at least a half exactly where the sum is at least 0, the threshold in the paper.

    Args:
        gates: [E 5], four weights and a bias per exit. Made by `calibrate(JEIDNN, ...)`, for a price of cost.
        thresholds: one per exit, in units of the sum; or one value for all. The last is not used.
        power: g, above 0.
        enabled: one flag per exit; None means that all are on.

    Source: Chataoui et al. 2024 (JEI-DNN, ICLR), section 4, and the released code. Theirs trains gates and exits in
    turns; ours trains the gates for exits that stay as they are, and bisects on the price until a budget is met.
    """

    gates: Array
    thresholds: tuple[float, ...] | float = 0.0
    power: float = 0.5
    enabled: tuple[bool, ...] | None = None
    needs: ClassVar[tuple[str, ...]] = ()
    per_exit: ClassVar[tuple[str, ...]] = ("thresholds", "enabled")

    def __post_init__(self) -> None:
        if not isinstance(self.gates, Array) or len(self.gates.shape) != 2 or self.gates.shape[1] != 5:
            raise ShapeError("gates must be an Array [E 5]: four weights and a bias per exit.")
        power = as_floats(self.power, "power")
        if isinstance(power, tuple) or power <= 0:
            raise ValueRangeError(f"power is {self.power!r}; expected a number above 0.")
        object.__setattr__(self, "power", power)
        object.__setattr__(self, "thresholds", as_floats(self.thresholds, "thresholds"))
        object.__setattr__(self, "enabled", as_flags(self.enabled))

    def init(self, seen: Evidence) -> State:
        """No state."""
        return ()

    def step(self, k: int, seen: Evidence, state: State) -> Step:
        """Stop where the gate of exit k opens."""
        gate = self.gates.tensor(seen.logits.device)[k]
        score = (gate_features(seen.logits, self.power) * gate[:4]).sum(dim=-1) + gate[4]
        return Step(fires(self, k, score), score, seen.logits, state)


def gate_features(logits: Float[Tensor, "*batch cls"], power: float) -> Float[Tensor, "*batch 4"]:
    """[max p, normalised entropy, margin, normalised entropy of p^power], float32.

    Raises:
        ValueRangeError: there is only one class.
    """
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueRangeError(f"JEI-DNN's gates see {classes} class; expected at least 2 classes.")
    log_p = torch.log_softmax(logits.float(), dim=-1)
    top = log_p.topk(2, dim=-1).values.exp()
    unit = torch.log(torch.tensor(float(classes), device=logits.device))
    entropies = [-(x.exp() * x).sum(dim=-1) / unit for x in (log_p, torch.log_softmax(power * log_p, dim=-1))]
    return torch.stack([top[..., 0], entropies[0], top[..., 0] - top[..., 1], entropies[1]], dim=-1)
