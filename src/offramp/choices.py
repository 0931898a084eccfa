"""Families with their options by the names of the command line and of tables."""

from typing import Any

from offramp.calibrate import Calibration, Calibrator, Options, Target, calibrate_with
from offramp.cost import CostModel
from offramp.errors import ValueRangeError
from offramp.policies import (
    BEEM,
    EERO,
    FPABEE,
    JEIDNN,
    PCEE,
    ZTW,
    AccuracyBins,
    BERxiT,
    EENet,
    Entropy,
    Fixed,
    Margin,
    MaxProb,
    MSDNet,
    Patience,
    Stopping,
    Voting,
)
from offramp.trace import ExitTrace

__all__ = ["CHOICES", "HEADLINE", "calibrate_choice", "calibrator_of", "choice", "families_for"]

#: What `--family` and tables call a family with its options.
CHOICES: dict[str, tuple[Any, dict[str, Any]]] = {
    "max-prob": (MaxProb, {}),
    "entropy": (Entropy, {}),
    "margin": (Margin, {}),
    "patience": (Patience, {}),
    "f-pabee": (FPABEE, {}),
    "pcee": (PCEE, {}),
    "voting": (Voting, {}),
    "msdnet": (MSDNet, {}),
    "beem-c": (BEEM, {"weights": "cost"}),
    "beem-a": (BEEM, {"weights": "accuracy"}),
    "eenet": (EENet, {}),
    "ztw": (ZTW, {}),
    "jei-dnn": (JEIDNN, {}),
    "berxit": (BERxiT, {}),
    "accuracy-bins": (AccuracyBins, {}),
    "eero": (EERO, {}),
    "fixed": (Fixed, {}),
    "stopping": (Stopping, {}),
}


#: What quickstart and reports show unless asked for more.
HEADLINE = ("max-prob", "entropy", "patience", "beem-c", "beem-a", "eenet")


def choice(name: str) -> tuple[Any, dict[str, Any]]:
    """The family and the options that a name stands for.

    Raises:
        ValueRangeError: the name is unknown.
    """
    if name not in CHOICES:
        raise ValueRangeError(f"unknown policy {name!r}; expected one of {', '.join(CHOICES)}.")
    return CHOICES[name]


def families_for(trace: ExitTrace) -> tuple[str, ...]:
    """The names in `CHOICES` that a trace has the signals for."""
    return tuple(name for name, (kind, _) in CHOICES.items() if set(kind.needs) <= set(trace.signal_names))


def calibrator_of(name: str, trace: ExitTrace, costs: CostModel) -> Calibrator:
    """The `Calibrator` of a family named as in `CHOICES`."""
    family, options = choice(name)
    return Calibrator(family, trace, costs, Options(**options))


def calibrate_choice(
    name: str, trace: ExitTrace, costs: CostModel, target: Target, certify: ExitTrace | None = None, *,
    thin: bool = False,
) -> Calibration:  # fmt: skip
    """`calibrate` for a family named as in `CHOICES`."""
    family, options = choice(name)
    return calibrate_with(family, trace, costs, target, Options(**options), certify=certify, thin=thin)
