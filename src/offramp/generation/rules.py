"""How tokens leave: a policy, and what may be asked of it besides."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from offramp.errors import FormatError, OfframpError, ShapeError, ValueRangeError
from offramp.policies import Entropy, Margin, MaxProb, Policy, from_dict, to_dict
from offramp.policies.base import check_exits, visits

__all__ = ["TokenPolicy", "as_rule"]

KIND, VERSION = "offramp.token_policy", 1


@dataclass(frozen=True)
class TokenPolicy:
    """A policy for tokens.

    Args:
        policy: decides at every exit, anew for every token.
        decay: tau of thresholds that fall while a text grows: token t of at most N is held against
            clip(0.9 x + 0.1 exp(-tau t / N), 0, 1) where the policy has a threshold x. For MaxProb, Margin and
            Entropy, whose scores are in [0, 1]; None leaves thresholds as they are.
        least: the first exit at which a token may leave, 0-based; those before it are not looked at.
        gate: the probability of being right that a gate has to give before an exit's vocabulary is looked at; None
            looks at every exit. For models with gates.

    Source: Schuster et al. 2022 (CALM), for the decay.
    """

    policy: Policy
    decay: float | None = None
    least: int = 0
    gate: float | None = None

    def __post_init__(self) -> None:
        if self.decay is not None:
            if not isinstance(self.policy, MaxProb | Margin | Entropy):
                raise ValueRangeError(
                    f"thresholds of {type(self.policy).__name__} cannot decay; expected MaxProb, Margin or Entropy."
                )
            if not math.isfinite(self.decay) or self.decay < 0:
                raise ValueRangeError(f"decay is {self.decay!r}; expected a number from 0.")
        if self.least < 0:
            raise ValueRangeError(f"least is {self.least}; expected the number of an exit, from 0.")
        if self.gate is not None and not 0 <= self.gate <= 1:
            raise ValueRangeError(f"gate is {self.gate!r}; expected a probability.")

    def at(self, token: int, most: int) -> Policy:
        """The policy for new token number `token` of at most `most`."""
        if self.decay is None:
            return self.policy
        policy: Any = self.policy
        more = 0.1 * math.exp(-self.decay * token / most)
        fall = lambda x: min(1.0, max(0.0, 0.9 * x + more))  # noqa: E731
        x = policy.thresholds
        return dataclasses.replace(policy, thresholds=tuple(map(fall, x)) if isinstance(x, tuple) else fall(x))

    def visited(self, exits: int) -> tuple[int, ...]:
        """The exits at which a token may leave, and the last."""
        return tuple(k for k in visits(self.policy, exits) if k >= self.least or k == exits - 1)

    def to_dict(self) -> dict[str, Any]:
        """The rule as a JSON object."""
        fields = {"policy": to_dict(self.policy), "decay": self.decay, "least": self.least, "gate": self.gate}
        return {"kind": KIND, "version": VERSION, "fields": fields}

    @classmethod
    def from_dict(cls, value: Any) -> "TokenPolicy":
        """The rule that `to_dict` described.

        Raises:
            FormatError: the object describes none.
        """
        fields = value.get("fields") if isinstance(value, dict) else None
        if not isinstance(fields, dict) or (value.get("kind"), value.get("version")) != (KIND, VERSION):
            raise FormatError(f"not a token policy: expected an object of kind {KIND!r}, version {VERSION}.")
        if set(fields) != {"policy", "decay", "least", "gate"}:
            raise FormatError(f"a token policy has policy, decay, least and gate; got {', '.join(sorted(fields))}.")
        try:
            return cls(from_dict(fields["policy"]), fields["decay"], fields["least"], fields["gate"])
        except (TypeError, OfframpError) as error:
            raise FormatError(f"a token policy cannot be made from these fields: {error}") from None


def as_rule(policy: Policy | TokenPolicy | None, exits: int, *, gates: bool = False) -> TokenPolicy | None:
    """The rule for a model with so many exits.

    Raises:
        ShapeError: it is for another number of exits, needs signals, or gates that the model does not have.
    """
    if policy is None:
        return None
    if not isinstance(policy, Policy | TokenPolicy):
        raise ValueRangeError(f"the policy is {policy!r}; expected a policy, a TokenPolicy, or None.")
    rule = policy if isinstance(policy, TokenPolicy) else TokenPolicy(policy)
    check_exits(rule.policy, exits)
    if rule.policy.needs:
        raise ShapeError(f"{type(rule.policy).__name__} needs signals, which token exits do not have.")
    if rule.gate is not None and not gates:
        raise ShapeError("the rule asks gates, and the model has none; learn them with learn_gates, or take gate=None.")
    return rule
