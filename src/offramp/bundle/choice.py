"""A policy in a bundle, and what is known of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offramp.artefacts import kind_of, read_json, write_json
from offramp.calibrate import Calibration
from offramp.check import Reference
from offramp.cost import Budget, CostModel
from offramp.policies import FAMILIES, MaxProb, Policy, from_dict, to_dict

__all__ = ["PLAIN", "Choice", "about_choice", "plain_policy", "read_choice", "write_choice"]

#: The name of the policy that every bundle has: no exit is visited but the model's own output.
PLAIN = "plain"


@dataclass(frozen=True)
class Choice:
    """A policy in a bundle, and what is known of it.

    Args:
        policy: what runs.
        calibration: how it was found, or None.
        shares: of rows that left at each exit, on the calibration rows; None when not known. With the costs of the
            bundle they give what the policy spends, in any unit.
        tested: what it did on rows never seen: cost, accuracy, low, high, plain, rows, speed-ups; may be {}.
        reference: what the calibration rows looked like to the policy, for `check`; None when not known.
    """

    policy: Policy
    calibration: Calibration | None = None
    shares: tuple[float, ...] | None = None
    tested: Mapping[str, Any] = field(default_factory=dict)
    reference: Reference | None = None

    def spent(self, budget: Budget, costs: CostModel | None) -> float | None:
        """The mean cost of a row in the budget's unit, or None when that is not known."""
        if self.shares is not None and costs is not None and _measured(costs, budget):
            return costs.spent(self.shares, budget, self.policy.enabled)
        found = self.calibration
        if found is None or not isinstance(found.target, Budget) or found.target.unit != budget.unit:
            return None
        same_size = budget.unit != "ms" or found.target.batch_size == budget.batch_size
        return found.achieved if same_size else None


def plain_policy(exits: int) -> Policy:
    """The policy that visits no exit but the last, for a model with E exits."""
    return MaxProb((1.0,) * exits, enabled=(*(False,) * (exits - 1), True))


def _measured(costs: CostModel, budget: Budget) -> bool:
    if budget.unit == "fraction":
        return True
    return bool(costs.timed) if budget.unit == "ms" else costs.plain_flops is not None


def about_choice(choice: Choice) -> dict[str, Any]:
    """What the manifest says about a choice."""
    known = {} if choice.reference is None else {"reference": choice.reference.to_dict()}
    return {"shares": choice.shares, "tested": dict(choice.tested), **known}


def write_choice(choice: Choice, path: Path) -> None:
    """Nothing; the calibration, or the policy alone, is in the file."""
    if choice.calibration is not None and choice.calibration.policy == choice.policy:
        choice.calibration.save(path)
    else:
        write_json(path, to_dict(choice.policy))


def read_choice(path: Path, about: Mapping[str, Any]) -> Choice:
    """The choice in a file, with what the manifest says about it.

    Raises:
        FormatError: the file is damaged.
        KeyError, TypeError, ValueError: what the manifest says is damaged.
    """
    value = read_json(path)
    shares, tested = about["shares"], dict(about["tested"])
    shares = None if shares is None else tuple(map(float, shares))
    # bundles that were written before there were references have none
    reference = Reference.from_dict(about["reference"]) if about.get("reference") is not None else None
    if kind_of(value) in FAMILIES:
        return Choice(from_dict(value), None, shares, tested, reference)
    found = Calibration.load(path)
    return Choice(found.policy, found, shares, tested, reference)
