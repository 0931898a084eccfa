"""Measured speed of a policy: whole live runs against the plain model in the same engine, taking turns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from offramp.cost import CostModel
from offramp.data import Examples
from offramp.errors import DataError
from offramp.inputs import Inputs, batch_size
from offramp.machine import alternate, waiter
from offramp.model import ExitModel
from offramp.policies.base import Evidence, Policy, visits
from offramp.runtime import Runtime
from offramp.trace import ExitTrace

__all__ = ["Speed", "batches_of", "never", "over", "promised", "time_policies", "with_step_times"]


@dataclass(frozen=True)
class Speed:
    """What one policy took at one batch size, heads, policy and regrouping included.

    Args:
        batch_size: rows per call.
        policy: its name.
        plain_ms: median milliseconds per batch of the plain model (the faster of the original and its exported graph).
        policy_ms: median milliseconds per batch of the live run on the same rows.
        spread_ms: interquartile range of `policy_ms` over rounds.
        speedup: plain_ms / policy_ms.
        promise: the speed-up that the stages alone allow, each timed at the sizes that reached it; None if not timed.
        shares: of rows that left at each exit.
    """

    batch_size: int
    policy: str
    plain_ms: float
    policy_ms: float
    spread_ms: float
    speedup: float
    promise: float | None
    shares: tuple[float, ...]

    @property
    def kept(self) -> float | None:
        """The part of the promise that the live run kept."""
        return None if self.promise is None else self.speedup / self.promise


def time_policies(
    model: ExitModel,
    policies: dict[str, Policy],
    batches: Sequence[Inputs],
    *,
    costs: CostModel | None = None,
    rounds: int = 9,
    seconds: float = 6.0,
) -> tuple[Speed, ...]:
    """One measured speed per policy, on the same batches (all of one size), in alternating rounds over all of them.

    Args:
        model: from `attach`.
        policies: by name.
        batches: real rows, so that exit shares are real; all with the same number of rows.
        costs: from `measure`, for the promise.
        rounds, seconds: at most so many rounds, and about so long.

    Raises:
        DataError: no batches, or batches of different sizes.
    """
    sizes = {batch_size(b) for b in batches}
    if len(sizes) != 1:
        raise DataError(f"timing needs at least one batch, all of one size; got sizes {sorted(sizes)}.")
    size, stages = sizes.pop(), model.stages()
    runs = {name: Runtime(model, policy) for name, policy in policies.items()}
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            contenders: dict[str, Callable[[], object]] = {f"policy {n}": over(r, batches) for n, r in runs.items()}
            contenders |= {"plain": over(model.plain, batches), "whole": over(stages.whole, batches)}
            took = alternate(contenders, rounds=rounds, seconds=seconds, after=waiter(batches[0]))
            exits = {name: [run(b).exit.cpu() for b in batches] for name, run in runs.items()}
    finally:
        model.train(training)
    plain_s = min(took["plain"].median_s, took["whole"].median_s)
    speeds = []
    for name in policies:
        mine = took[f"policy {name}"]
        counts = [torch.bincount(e, minlength=model.exits) for e in exits[name]]
        total = torch.stack(counts).sum(dim=0).double()
        promise = None
        if costs is not None and costs.timed:
            promise = promised(costs, size, [c.tolist() for c in counts])
        per = 1000.0 / len(batches)
        speeds.append(
            Speed(
                batch_size=size,
                policy=name,
                plain_ms=plain_s * per,
                policy_ms=mine.median_s * per,
                spread_ms=mine.spread_s * per,
                speedup=plain_s / mine.median_s,
                promise=promise,
                shares=tuple((total / total.sum()).tolist()),
            )
        )
    return tuple(speeds)


def promised(costs: CostModel, size: int, left: Sequence[Sequence[int]]) -> float:
    """The speed-up that the stages alone allow: plain time over the stages' times at the sizes that reached them.

    Args:
        costs: from `measure`: plain and stages took turns there.
        size: rows in each batch.
        left: for each batch, how many rows left at each exit.
    """
    return len(left) * costs.plain_s(size) / sum(costs.stages_s(counts) for counts in left)


def batches_of(examples: Examples, size: int, *, rows: int = 256) -> list[Inputs]:
    """Whole batches of `size` real rows in file order, about `rows` rows in all, at least one batch.

    Raises:
        DataError: there are fewer rows than one batch.
    """
    count = max(1, min(rows, len(examples)) // size)
    if len(examples) < size:
        raise DataError(f"there are {len(examples)} rows, fewer than one batch of {size}. Time smaller batches.")
    return [examples.batch(torch.arange(i * size, (i + 1) * size)).inputs for i in range(count)]


def over(call: Callable[[Inputs], object], batches: Sequence[Inputs]) -> Callable[[], object]:
    """What makes one call for each batch."""
    return lambda: [call(batch) for batch in batches]


def never(policy: Policy) -> Policy:
    """The policy with every exit visited and none taken: thresholds that no score reaches."""
    named = {field.name for field in fields(policy)}  # type: ignore[arg-type]
    everyone = {"enabled": None} if "enabled" in named else {}
    if "patience" in named:
        return replace(policy, patience=10**6, **everyone)  # type: ignore[type-var, arg-type]
    thresholds = policy.thresholds  # type: ignore[attr-defined]
    count = len(thresholds) if isinstance(thresholds, tuple) else 1
    return replace(policy, thresholds=(1e6,) * count if count > 1 else 1e6, **everyone)  # type: ignore[type-var, arg-type]


def with_step_times(costs: CostModel, policy: Policy, trace: ExitTrace, *, seconds: float = 0.3) -> CostModel:
    """The cost model with the measured seconds of one policy step (decision and choice of rows) at each timed size.

    Measured on the trace's logits, on the CPU. A budget in milliseconds then counts decisions beside stages and heads.

    Args:
        seconds: about so long per batch size.
    """
    visited, needed = visits(policy, trace.exits), trace.signals_for(policy.needs)
    timed = []
    for row in costs.timed:
        everyone = torch.arange(row.batch_size)
        logits = trace.logits[:, everyone % trace.rows]
        signals = None if needed is None else needed[:, everyone % trace.rows]

        def decide(logits: Tensor = logits, signals: Tensor | None = signals, everyone: Tensor = everyone) -> None:
            state = None
            for k in visited:
                seen = Evidence(logits[k], None if signals is None else signals[k])
                step = policy.step(k, seen, policy.init(seen) if state is None else state)
                int(step.stop.sum())  # the runtime waits for this count, then regroups
                state = tuple(part[everyone] for part in step.state)

        with torch.inference_mode():
            took = alternate({"steps": decide}, rounds=50, seconds=seconds)["steps"]
        timed.append(replace(row, step_s=took.median_s / len(visited)))
    return replace(costs, timed=tuple(timed))
