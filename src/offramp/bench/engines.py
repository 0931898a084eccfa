"""One engine in one precision: made, its logits recorded, thresholds calibrated on them, memory read off."""

import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from offramp.bench.memory import Growth
from offramp.bench.plan import Pair, Plan, Subject
from offramp.bench.value import EngineFacts, Foreign, Rate, Threshold
from offramp.choices import calibrate_choice
from offramp.cost import Budget, CostModel
from offramp.engines import Engine, engine
from offramp.inputs import Inputs
from offramp.measure import measure
from offramp.metrics import rate_interval
from offramp.policies import MaxProb, Policy
from offramp.record import record, to_device
from offramp.runtime import Runtime
from offramp.simulate import simulate
from offramp.trace import ExitTrace
from offramp.units import precision_of

__all__ = ["Made", "judged_at", "make", "rate_of"]

TYPICAL = 64  # rows that FLOPs are counted on
RECORDED = 64  # rows at once while recording


@dataclass(frozen=True, eq=False)
class Made:
    """An engine that is ready to be timed.

    Args:
        engine: what runs.
        policies: with thresholds for this engine.
        test: what every exit says about the judged rows, in this engine's arithmetic.
        facts: for the table.
    """

    engine: Engine
    policies: dict[str, Policy]
    test: ExitTrace
    facts: EngineFacts


def make(subject: Subject, plan: Plan, pair: Pair) -> Made:
    """The engine, with families calibrated on its own logits.

    Raises:
        OfframpError: the engine cannot run this model, or not here.
    """
    model, own = subject.model, precision_of(subject.model)
    model.eval()
    model.stages()  # cutting is not the engine's memory
    before, began = Growth.begin(), time.perf_counter()
    made = engine(model, pair.engine, precision=pair.precision, threads=plan.threads)
    largest = _inputs(subject, torch.arange(max(plan.batch_sizes)))
    Runtime(model, MaxProb(2.0), made, calibrated=made.precision)(largest)  # no score reaches 2: every exit is visited
    took, grown = time.perf_counter() - began, Growth.since(before)
    test = record(model, subject.test, batch_size=RECORDED, engine=made, progress=False)
    costs = measure(model, _inputs(subject, torch.arange(min(TYPICAL, len(subject.test)))), batch_sizes=())
    families = [name for name in plan.policies if name not in subject.named]
    policies, thresholds = _calibrated(subject, families, made, costs, plan)
    for name in plan.policies:
        if name in subject.named:
            policy, made_on = subject.named[name]
            policies[name], thresholds[name] = policy, Threshold(made_on, "as given", None, _on(policy))
    foreign = {} if made.precision == own else _foreign(subject, families, policies, test, costs, plan)
    facts = EngineFacts(
        engine=made.name,
        precision=made.precision,
        made_s=took,
        peak_mb=None if grown is None else grown.peak_mb,
        kept_mb=None if grown is None else grown.kept_mb,
        exits=test.accuracy(),
        thresholds={name: thresholds[name] for name in plan.policies},
        foreign=foreign,
    )
    return Made(made, {name: policies[name] for name in plan.policies}, test, facts)


def judged_at(subject: Subject, call: Any, size: int) -> list[Any]:
    """What a call gives for each batch of all judged rows in their order; the last may be smaller."""
    rows = torch.arange(len(subject.test))
    with torch.inference_mode():
        return [call(_inputs(subject, part)) for part in rows.split(size)]


def rate_of(right: Bool[Tensor, "row"]) -> Rate:
    """The share of right rows, with Wilson's 95 % interval."""
    return Rate(float(right.double().mean()), *rate_interval(right.double()))


def _inputs(subject: Subject, rows: Tensor) -> Inputs:
    return to_device(subject.test.batch(rows).inputs, next(subject.model.parameters()).device)


def _calibrated(
    subject: Subject, families: list[str], made: Engine | None, costs: CostModel, plan: Plan
) -> tuple[dict[str, Policy], dict[str, Threshold]]:
    """(policies, how their thresholds were found), on an engine's own logits, or on the model's own."""
    if not families:
        return {}, {}
    fit = record(subject.model, subject.fit, batch_size=RECORDED, engine=made, progress=False)
    policies, thresholds = {}, {}
    for name in families:
        found = calibrate_choice(name, fit, costs, Budget(fraction=plan.fraction), thin=plan.thin)
        policies[name] = found.policy
        thresholds[name] = Threshold(fit.precision, found.status, found.achieved, _on(found.policy))
    return policies, thresholds


def _on(policy: Policy) -> tuple[int, ...]:
    """The exits that are on, where some are off."""
    flags = policy.enabled or ()
    return () if all(flags) else tuple(k for k, on in enumerate(flags) if on)


def _foreign(
    subject: Subject, families: list[str], own: dict[str, Policy], test: ExitTrace, costs: CostModel, plan: Plan
) -> dict[str, Foreign]:
    """What thresholds of the model's own precision do on this engine's logits."""
    if not families:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        others, _ = _calibrated(subject, families, None, costs, plan)
    before = record(subject.model, subject.test, batch_size=RECORDED, progress=False)
    found = {}
    for name in families:
        kept, moved = simulate(others[name], before, costs), simulate(others[name], test, costs)
        mine = simulate(own[name], test, costs)
        found[name] = Foreign(
            changed=float((kept.exit != moved.exit).double().mean()),
            accuracy=rate_of(moved.right),  # type: ignore[arg-type]
            cost=moved.cost,
            own_accuracy=rate_of(mine.right),  # type: ignore[arg-type]
            own_cost=mine.cost,
        )
    return found
