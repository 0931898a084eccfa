"""From a family, or a policy value whose thresholds are free, to its ladder on a trace."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.calibrate.eenet import EENetFit, blank_eenet, fit_eenet
from offramp.calibrate.ladders import (
    ALWAYS,
    Ladder,
    QuotaLadder,
    RunLadder,
    SharedLadder,
    SpendOf,
    StepLadder,
)
from offramp.calibrate.learned import fit_bins, fit_ztw, gate_ladder
from offramp.calibrate.spend import Spend
from offramp.calibrate.stopping import StoppingFit, choose_stopping, unbiased
from offramp.cost import CostModel
from offramp.errors import ValueRangeError
from offramp.policies import (
    BEEM,
    EERO,
    FAMILIES,
    FPABEE,
    JEIDNN,
    PCEE,
    ZTW,
    AccuracyBins,
    Array,
    BERxiT,
    EENet,
    Entropy,
    Fixed,
    Margin,
    MaxProb,
    MSDNet,
    Patience,
    Policy,
    Stopping,
    Voting,
)
from offramp.policies.base import as_floats
from offramp.policies.fpabee import divergence
from offramp.scores import neg_entropy
from offramp.trace import ExitTrace

__all__ = ["MAKERS", "EENetLadder", "Options", "Weights", "beem_weights", "ladder_of", "plain_flags", "switched_off"]

Weights = Literal["accuracy", "cost"] | Sequence[float | int]


@dataclass(frozen=True)
class Options:
    """Settings of families that a policy value does not hold: see `calibrate`."""

    weights: Weights = "accuracy"
    reset: Literal["own", "zero"] = "own"
    fit: EENetFit | None = None
    beta: float = 5.0
    stopping: StoppingFit | None = None


def ladder_of(
    family: Any, trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], options: Options
) -> tuple[Policy, Ladder]:
    """(the policy that lets every row leave as early as it can, the ladder of its family).

    Raises:
        ValueRangeError: the family is none.
        DataError: it needs labels and there are none.
    """
    kind = family if isinstance(family, type) else type(family)
    if kind not in MAKERS:
        raise ValueRangeError(
            f"{family!r} cannot be calibrated; expected one of {', '.join(FAMILIES)}, or a value of one."
        )
    return MAKERS[kind](None if isinstance(family, type) else family, trace, costs, flags, options)


def switched_off(start: Policy, trace: ExitTrace) -> Policy:
    """The policy of `start`'s family that is the plain model: every row runs to the end, and the last exit answers."""
    only_last = (False,) * (trace.exits - 1) + (True,)
    biases = Array(torch.zeros(trace.exits, trace.classes))
    if isinstance(start, ZTW):  # whose last mixture is another model; weights are exponents
        return replace(start, weights=Array(torch.zeros(trace.exits, trace.exits)), biases=biases, cascade=None,
                       enabled=only_last)  # fmt: skip
    if isinstance(start, Stopping):
        own = Array(torch.eye(trace.exits))
        return replace(start, weights=own, biases=Array(unbiased(trace)), gates=None, enabled=only_last)
    if isinstance(start, EENet):  # its features count the exits that are on
        return blank_eenet(trace.exits, trace.classes, only_last)
    if isinstance(start, Fixed):
        return Fixed(trace.exits - 1, trace.exits)
    return replace(start, enabled=only_last)  # type: ignore[type-var, call-arg]


def beem_weights(trace: ExitTrace, weights: Weights) -> tuple[float, ...]:
    """BEEM's expert weights: "accuracy" is each exit's accuracy on the trace (BEEM-A), "cost" is 0.1 (k + 1) (BEEM-C).

    Source: Bajpai and Hanawal 2025, section 3; figure 1 shows 0.1 to 1.2 over 12 layers.
    """
    if weights == "accuracy":
        return trace.accuracy()
    if weights == "cost":
        return tuple(round(0.1 * (k + 1), 12) for k in range(trace.exits))
    if isinstance(weights, str):
        raise ValueRangeError(f"weights is {weights!r}; expected 'accuracy', 'cost' or one number per exit.")
    found = as_floats(weights, "weights")
    if not isinstance(found, tuple):
        raise ValueRangeError(f"weights is {weights!r}; expected 'accuracy', 'cost' or one number per exit.")
    return found


def plain_flags(flags: tuple[bool, ...]) -> tuple[bool, ...] | None:
    """None when every exit is on: the simpler value prints shorter."""
    return None if all(flags) else flags


_Made = tuple[Policy, Ladder]


def _shared(value: Any, make: Callable[[], Policy], trace: ExitTrace, flags: tuple[bool, ...]) -> _Made:
    """The ladder of a policy with free thresholds: the value's other fields, or those that `make` gives."""
    start: Any = make() if value is None else value
    start = replace(start, thresholds=(ALWAYS,) * trace.exits, enabled=plain_flags(flags))
    return start, SharedLadder.of(start, trace, flags)


def _simple(kind: Any) -> Callable[..., _Made]:
    return lambda value, trace, costs, flags, options: _shared(value, lambda: kind(thresholds=0.0), trace, flags)


def _beem(value: Any, trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], options: Options) -> _Made:
    weights = () if value is not None else beem_weights(trace, options.weights)
    return _shared(value, lambda: BEEM(weights, 0.0, reset=options.reset), trace, flags)


def _ztw(value: Any, trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], options: Options) -> _Made:
    return _shared(value, lambda: fit_ztw(trace, flags), trace, flags)


def _bins(value: Any, trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], options: Options) -> _Made:
    return _shared(value, lambda: fit_bins(trace, flags), trace, flags)


def _patience(value: Any, trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], options: Options) -> _Made:
    start = replace(value or Patience(0), patience=0, enabled=plain_flags(flags))
    steps = [replace(start, patience=count) for count in range(sum(flags))]
    return start, StepLadder.of(steps, trace, costs)


def _fixed(value: Any, trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], options: Options) -> _Made:
    steps = [Fixed(k, trace.exits) for k, on in enumerate(flags) if on]
    return steps[0], StepLadder.of(steps, trace, costs)


def _fpabee(value: Any, trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], options: Options) -> _Made:
    start = replace(value or FPABEE(1.0), patience=0, enabled=plain_flags(flags))
    logits = trace.logits[[k for k, on in enumerate(flags) if on]]
    moved = [torch.full_like(logits[0, :, 0], 1e9)]
    moved += [divergence(logits[i - 1], logits[i], start.measure, start.task) for i in range(1, len(logits))]

    def make(count: int, score: float) -> Policy:
        # moved < tau where -moved >= score: the next number up keeps the rows at the threshold
        tau = torch.nextafter(torch.tensor(-score), torch.tensor(torch.inf))
        return replace(start, patience=count, tau=float(tau.clamp(min=1e-30)))

    return start, RunLadder.of(start, trace, flags, -torch.stack(moved), make, range(1, max(2, len(logits) - 1)))


def _pcee(value: Any, trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], options: Options) -> _Made:
    start = replace(value or PCEE(0.0), patience=1, tau=ALWAYS, enabled=plain_flags(flags))
    scores = neg_entropy(trace.logits[[k for k, on in enumerate(flags) if on]])

    def make(count: int, score: float) -> Policy:
        return replace(start, patience=count, tau=score)

    return start, RunLadder.of(start, trace, flags, scores, make, range(1, max(2, len(scores))))


def _quotas(kind: Any, shares_for: Any, trace: ExitTrace, flags: tuple[bool, ...]) -> _Made:
    start = kind(thresholds=(ALWAYS,) * trace.exits, enabled=plain_flags(flags))
    return start, QuotaLadder(start, trace, flags, shares_for)


def _geometric(spend: Spend) -> Callable[[float], Float[Tensor, "visit"]]:
    """Shares of the visited exits proportional to q^k, q from 1e-4 to 1e4 evenly in its logarithm over [-1, 1]."""
    place = torch.arange(1, len(spend.visited) + 1, dtype=torch.float64)
    return lambda knob: torch.softmax(place * knob * 9.2103, dim=0)


def _msdnet(value: Any, trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], options: Options) -> _Made:
    return _quotas(MSDNet, _geometric, trace, flags)


def _eero(value: Any, trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], options: Options) -> _Made:
    errors = 1 - torch.tensor(trace.accuracy(), dtype=torch.float64)

    def shares_for(spend: Spend) -> Callable[[float], Float[Tensor, "visit"]]:
        cost = torch.tensor(spend.cumulative, dtype=torch.float64)
        base, cost = -options.beta * errors[list(spend.visited)], cost / cost[-1]
        # mu from one end to the other, by the cost's own scale
        return lambda knob: torch.softmax(base + 200.0 * knob * cost, dim=0)

    return _quotas(EERO, shares_for, trace, flags)


def _jei(value: Any, trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], options: Options) -> _Made:
    if value is not None:
        return _shared(value, lambda: value, trace, flags)
    ladder = gate_ladder(trace, costs, flags)
    return ladder.start(), ladder


@dataclass(frozen=True)
class EENetLadder:
    """EENet, fitted anew for every budget, because the budget is a term of its objective."""

    trace: ExitTrace
    flags: tuple[bool, ...]
    settings: EENetFit
    rungs: int = 20

    def at(self, spend_of: SpendOf) -> Policy:
        """See `Ladder`."""
        return fit_eenet(self.trace, spend_of, self.settings, self.flags)


def _eenet(value: Any, trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], options: Options) -> _Made:
    if value is not None:
        raise ValueRangeError("EENet's scores are fitted for a budget; give the family EENet, and fit=EENetFit(...).")
    trace.known_labels("EENet, whose scores are fitted to right and wrong answers,")
    return blank_eenet(trace.exits, trace.classes, flags), EENetLadder(trace, flags, options.fit or EENetFit())


def _stopping(value: Any, trace: ExitTrace, costs: CostModel, flags: tuple[bool, ...], options: Options) -> _Made:
    if value is not None:
        return _shared(value, lambda: value, trace, flags)
    return choose_stopping(trace, costs, flags, options.stopping or StoppingFit())


MAKERS: dict[type, Callable[..., _Made]] = {
    MaxProb: _simple(MaxProb),
    Entropy: _simple(Entropy),
    Margin: _simple(Margin),
    Voting: _simple(Voting),
    BERxiT: _simple(BERxiT),
    Patience: _patience,
    FPABEE: _fpabee,
    PCEE: _pcee,
    MSDNet: _msdnet,
    BEEM: _beem,
    EENet: _eenet,
    ZTW: _ztw,
    JEIDNN: _jei,
    AccuracyBins: _bins,
    EERO: _eero,
    Fixed: _fixed,
    Stopping: _stopping,
}
