"""Policies as JSON, and back to equal values."""

import dataclasses
import json
from typing import Any

from offramp.errors import FormatError, OfframpError
from offramp.policies.arrays import Array
from offramp.policies.base import Policy
from offramp.policies.beem import BEEM
from offramp.policies.berxit import BERxiT
from offramp.policies.bins import AccuracyBins
from offramp.policies.confidence import Entropy, Margin, MaxProb
from offramp.policies.eenet import EENet
from offramp.policies.eero import EERO
from offramp.policies.fixed import Fixed
from offramp.policies.fpabee import FPABEE
from offramp.policies.jeidnn import JEIDNN
from offramp.policies.msdnet import MSDNet
from offramp.policies.patience import Patience
from offramp.policies.pcee import PCEE
from offramp.policies.stopping import Stopping
from offramp.policies.voting import Voting
from offramp.policies.ztw import ZTW

__all__ = ["FAMILIES", "dumps", "from_dict", "loads", "to_dict"]

FAMILIES: dict[str, type] = {
    "MaxProb": MaxProb,
    "Entropy": Entropy,
    "Margin": Margin,
    "Patience": Patience,
    "FPABEE": FPABEE,
    "PCEE": PCEE,
    "Voting": Voting,
    "MSDNet": MSDNet,
    "BEEM": BEEM,
    "EENet": EENet,
    "ZTW": ZTW,
    "JEIDNN": JEIDNN,
    "BERxiT": BERxiT,
    "AccuracyBins": AccuracyBins,
    "EERO": EERO,
    "Fixed": Fixed,
    "Stopping": Stopping,
}
VERSION = 1


def to_dict(policy: Policy) -> dict[str, Any]:
    """The policy as a JSON object: kind, version and its fields."""
    fields = {f.name: _plain(getattr(policy, f.name)) for f in dataclasses.fields(policy)}  # type: ignore[arg-type]
    return {"kind": type(policy).__name__, "version": VERSION, "fields": fields}


def from_dict(value: Any) -> Policy:
    """The policy that `to_dict` described.

    Raises:
        FormatError: the object is not a policy's, is from a newer version, or has unknown or missing fields.
    """
    if not isinstance(value, dict) or set(value) != {"kind", "version", "fields"}:
        raise FormatError("not a policy: expected an object with exactly the keys kind, version and fields.")
    kind, version, fields = value["kind"], value["version"], value["fields"]
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise FormatError(f"unknown policy kind {kind!r}; expected one of {', '.join(FAMILIES)}.")
    if type(version) is not int or version != VERSION:
        raise FormatError(f"policy version {version!r}; this Offramp reads {VERSION}. Update, or calibrate again.")
    cls = FAMILIES[kind]
    known = [f.name for f in dataclasses.fields(cls)]
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    if not isinstance(fields, dict) or set(fields) - set(known) or set(required) - set(fields):
        got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise FormatError(f"{kind} has fields {known}; got {got}. Calibrate again, or correct the file.")
    try:
        return cls(**{name: _frozen(v) for name, v in fields.items()})
    except (TypeError, OfframpError) as error:
        raise FormatError(f"{kind} cannot be made from these fields: {error}") from None


def dumps(policy: Policy) -> str:
    """The policy as JSON text."""
    return json.dumps(to_dict(policy), allow_nan=False)


def loads(text: str) -> Policy:
    """The policy in JSON text.

    Raises:
        FormatError: the text is not JSON, or not a policy.
    """
    try:
        return from_dict(json.loads(text))
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:  # besides bad JSON: numbers of too many digits, too deep nesting
        raise FormatError(f"not JSON: {error}. Expected what offramp.policies.dumps wrote.") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Array):
        return {"array": value.tolist()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) != {"array"}:
            raise FormatError(f"unknown keys {sorted(value)}; expected an array.")
        return Array(value["array"])
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
