"""Leave when one exit alone is confident enough: max-prob, entropy and margin."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from offramp import scores
from offramp.policies.base import Evidence, State, Step, as_flags, as_floats, fires

__all__ = ["Entropy", "Margin", "MaxProb"]


@dataclass(frozen=True)
class _Confidence:
    """One score per exit against one threshold per exit; no state."""

    thresholds: tuple[float, ...] | float
    enabled: tuple[bool, ...] | None = None
    needs: ClassVar[tuple[str, ...]] = ()
    per_exit: ClassVar[tuple[str, ...]] = ("thresholds", "enabled")

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", as_floats(self.thresholds, "thresholds"))
        object.__setattr__(self, "enabled", as_flags(self.enabled))

    def score(self, logits: Float[Tensor, "batch cls"]) -> Float[Tensor, "batch"]:
        raise NotImplementedError

    def init(self, seen: Evidence) -> State:
        """No state."""
        return ()

    def step(self, k: int, seen: Evidence, state: State) -> Step:
        """Stop where exit k's score is at least its threshold."""
        score = self.score(seen.logits)
        return Step(fires(self, k, score), score, seen.logits, state)


@dataclass(frozen=True)
class MaxProb(_Confidence):
    """Leave at the first exit k with max_c p_kc >= thresholds[k].

    Args:
        thresholds: one per exit, in probabilities; or one value for all. The last is not used.
        enabled: one flag per exit; None means that all are on.

    Source: Kaya et al. 2019 (Shallow-Deep Networks); Huang et al. 2018 (MSDNet), section 4.
    """

    def score(self, logits: Float[Tensor, "batch cls"]) -> Float[Tensor, "batch"]:
        """The largest probability of each row."""
        return scores.max_prob(logits)


@dataclass(frozen=True)
class Entropy(_Confidence):
    """Leave at the first exit k with 1 + sum_c p_kc log p_kc / log cls >= thresholds[k].

    Args:
        thresholds: one per exit, in [0, 1], 1 is certain; or one value for all. The last is not used.
        enabled: one flag per exit; None means that all are on.

    Source: Teerapittayanon et al. 2016 (BranchyNet); Xin et al. 2020 (DeeBERT). Theirs compares the entropy with `<`;
    ours is turned over and normalised, so that every score rises with confidence and lies in [0, 1].
    """

    def score(self, logits: Float[Tensor, "batch cls"]) -> Float[Tensor, "batch"]:
        """One minus the normalised entropy of each row."""
        return scores.neg_entropy(logits)


@dataclass(frozen=True)
class Margin(_Confidence):
    """Leave at the first exit k with p(1) - p(2) >= thresholds[k]: the largest probability less the second largest.

    Args:
        thresholds: one per exit, in [0, 1]; or one value for all. The last is not used.
        enabled: one flag per exit; None means that all are on.

    Source: Schuster et al. 2022 (CALM), section 3.3, "softmax response difference", there for tokens. With two classes
    it orders rows as max-prob does.
    """

    def score(self, logits: Float[Tensor, "batch cls"]) -> Float[Tensor, "batch"]:
        """The lead of the most probable class."""
        return scores.margin(logits)
