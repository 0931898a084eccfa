"""What a calibration returns: a policy, what it achieved, and a sentence."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from offramp.artefacts import read_json, write_json
from offramp.calibrate.error_rate import ErrorRate
from offramp.calibrate.max_drop import MaxDrop
from offramp.calibrate.risk import Joint, Promise, Risk
from offramp.cost import Budget
from offramp.errors import FormatError
from offramp.policies import Policy, from_dict, to_dict

__all__ = ["Calibration", "Status"]

KIND, VERSION = "offramp.calibration", 1

Status = Literal["met", "best_effort", "infeasible"]


@dataclass(frozen=True)
class Calibration:
    """A policy fitted to a target, and how that went on the rows it was fitted on.

    Args:
        policy: what to run.
        target: what was asked for.
        achieved: the mean cost on the calibration rows, in the target's unit (for ErrorRate and MaxDrop as a fraction;
            for Risk as a fraction, on the certify rows).
        status: met; best_effort when the target holds but the family could not use the budget up; infeasible when no
            policy of the family meets the target (`policy` is then the nearest one: the cheapest for a budget, the
            plain model for a risk).
        message: the same as a sentence for a person.
        rows: how many rows it was fitted on.
        promise: for Risk and Joint, what holds on new rows and what that rests on; None otherwise.
        precision: of the logits that it was fitted on; in another the thresholds need not hold.
    """

    policy: Policy
    target: Budget | ErrorRate | MaxDrop | Risk | Joint
    achieved: float
    status: Status
    message: str
    rows: int
    promise: Promise | None = None
    precision: str = "fp32"

    def save(self, path: str | Path) -> Path:
        """The path, after the calibration was written to it as JSON (atomically)."""
        fields = {
            "policy": to_dict(self.policy),
            "target": {"kind": type(self.target).__name__, **dataclasses.asdict(self.target)},
            "achieved": self.achieved,
            "status": self.status,
            "message": self.message,
            "rows": self.rows,
            **({} if self.promise is None else {"promise": dataclasses.asdict(self.promise)}),
            **({} if self.precision == "fp32" else {"precision": self.precision}),
        }
        return write_json(path, {"kind": KIND, "version": VERSION, "fields": fields})

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """The calibration in a file that `save` wrote.

        Raises:
            FormatError: the file is missing, damaged, not a calibration, or from a newer version.
        """
        value: dict[str, Any] = read_json(path)
        fields = value.get("fields")
        if value.get("kind") != KIND or value.get("version") != VERSION or not isinstance(fields, dict):
            raise FormatError(f"{path} is not a calibration of version {VERSION}. Calibrate again.")
        try:
            if fields["status"] not in get_args(Status):
                raise FormatError(f"status is {fields['status']!r}; expected one of {get_args(Status)}")
            promise = fields.get("promise")
            return cls(
                **{
                    **fields,
                    "policy": from_dict(fields["policy"]),
                    "target": _target(fields["target"]),
                    "promise": None if promise is None else Promise(**promise),
                }
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FormatError(f"{path} is a damaged calibration: {error}. Calibrate again.") from None


def _target(value: Any) -> Any:
    """The target that its fields and its kind describe."""
    fields = dict(value)
    kind = fields.pop("kind")
    if kind == "Joint":
        fields |= {"risk": Risk(**fields["risk"]), "budget": Budget(**fields["budget"])}
    kinds: dict[str, Any] = {"Budget": Budget, "ErrorRate": ErrorRate, "MaxDrop": MaxDrop, "Risk": Risk, "Joint": Joint}
    return kinds[kind](**fields)
