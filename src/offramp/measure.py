"""What a model costs here: FLOPs per row, and seconds of every stage and head at given batch sizes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from offramp.cost import CostModel, TimedCosts
from offramp.engines import Engine
from offramp.engines import engine as engine_of
from offramp.errors import ValueRangeError
from offramp.inputs import Inputs, batch_size, select_rows, tensors_of
from offramp.machine import alternate, machine_line, waiter
from offramp.model import ExitModel
from offramp.policies import MaxProb, Policy
from offramp.policies.base import Evidence, Step
from offramp.regroup import Results
from offramp.stages import Carry
from offramp.units import precision_of

__all__ = ["measure", "repeat_rows"]


def measure(
    model: ExitModel,
    inputs: Inputs,
    *,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
    rounds: int = 15,
    seconds: float = 1.0,
    engine: str | Engine = "eager",
    precision: str | None = None,
    policy: Policy | None = None,
    progress: Callable[[], None] | None = None,
) -> CostModel:
    """The model's costs: fractions by FLOPs (torch's counter), and median seconds in alternating runs: every stage,
    head, policy step and regrouping, on this machine and engine.

    With the engine "eager" the plain model is timed twice, as the user wrote it and as the exported graph that the
    stages are cut from; the faster counts, so that exits cannot win by what the export alone saves.

    Args:
        model: from `attach`; it is run in eval mode.
        inputs: typical rows, e.g. of the usual text length. They are repeated or cut to each batch size.
        batch_sizes: sizes to time; () counts FLOPs only. Times in between are interpolated.
        rounds, seconds: at most so many turns per size, and about so long.
        engine, precision: what runs the stages: a name, or what `engine(...)` returned.
        policy: whose step is timed; max-prob unless given.
        progress: called after every batch size.

    Raises:
        ValueRangeError: no rows, a batch size below 1, or an engine that was made for another model.
        NotStageable: the model cannot be cut.
    """
    if batch_size(inputs) == 0 or any(size < 1 for size in batch_sizes):
        raise ValueRangeError(f"measuring needs at least one row and sizes of at least 1; got {tuple(batch_sizes)}.")
    if isinstance(engine, Engine) and (engine.model is not model or precision not in (None, engine.precision)):
        raise ValueRangeError(
            "the engine was made for another model, or in another precision; make one for this model."
        )
    training, timed = model.training, []
    model.eval()
    try:
        runs = engine if isinstance(engine, Engine) else engine_of(model, engine, precision=precision)
        with torch.inference_mode():
            stage, head, plain = _flops(model, inputs)
            for size in sorted(set(batch_sizes)):
                timed.append(_times(runs, inputs, size, rounds, seconds, policy or MaxProb(1.0)))
                if progress is not None:
                    progress()
    finally:
        model.train(training)
    rows = batch_size(inputs)
    return CostModel(
        stage=tuple(f / plain for f in stage),
        head=tuple(f / plain for f in head),
        plain_flops=plain / rows,
        timed=tuple(timed),
        machine=machine_line() if timed else "",
        engine=runs.name,
        precision=runs.precision,
    )


def repeat_rows(inputs: Inputs, size: int) -> Inputs:
    """The rows of `inputs` in turn, until there are `size`."""
    device = tensors_of(inputs)[0].device
    return select_rows(inputs, torch.arange(size, device=device) % batch_size(inputs))


def _flops(model: ExitModel, inputs: Inputs) -> tuple[list[float], list[float], float]:
    """FLOPs of each stage, each head and the plain model, for all rows of the inputs."""
    stages = model.stages()
    carry, stage, head = stages.start(inputs), [], []
    for k in range(model.exits):
        flops, (tap, after) = _count(stages.run, k, carry)
        stage.append(flops)
        head.append(0.0 if after is None else _count(model.head_logits, k, tap, after.mask)[0])
        carry = after
    plain = sum(stage)
    if plain <= 0:
        raise ValueRangeError("torch counts no FLOPs in this model (no matrix product or convolution).")
    return stage, head, plain


def _count(call: Any, *arguments: Any) -> tuple[float, Any]:
    # the counter does not know the fused attention kernel of CPUs; the plain one does the same products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call(*arguments)
    return float(counter.get_total_flops()), result


def _times(engine: Engine, inputs: Inputs, size: int, rounds: int, seconds: float, policy: Policy) -> TimedCosts:
    model, batch = engine.model, repeat_rows(inputs, size)
    exits = range(model.exits)
    contenders = engine.parts(batch, policy) | _regroupings(model, batch, size)
    if engine.name == "eager" and engine.precision == precision_of(model):
        contenders["plain"] = lambda: model.plain(batch)
    took = alternate(contenders, rounds=rounds, seconds=seconds, after=waiter(inputs))
    plain = min((took[name] for name in ("plain", "whole") if name in took), key=lambda t: t.median_s)
    steps = [took[f"step {k}"].median_s for k in exits if f"step {k}" in took]
    return TimedCosts(
        batch_size=size,
        plain_s=plain.median_s,
        stage_s=tuple(took[f"stage {k}"].median_s for k in exits),
        head_s=tuple(took[f"head {k}"].median_s if f"head {k}" in took else 0.0 for k in exits),
        step_s=sum(steps) / max(1, len(steps)),
        spread_s=plain.spread_s,
        regroup_s=tuple(took[f"regroup {k}"].median_s if f"regroup {k}" in took else 0.0 for k in exits),
    )


def _regrouped(carry: Carry, size: int, step: Step, leaving: int) -> object:
    stay = Results(size).leave(0, step, leaving, True)
    return None if stay is None else carry.select(stay)


def _regroupings(model: ExitModel, batch: Inputs, size: int) -> dict[str, Callable[[], object]]:
    """Taking every other row out behind each exit; torch does that for all engines but "onnx-file", whose graph does
    the same with operators of its own."""
    found: dict[str, Callable[[], object]] = {}
    stages = model.stages()
    carry: Any = stages.start(batch)
    if size < 2:
        return found
    device = tensors_of(batch)[0].device
    stop = torch.arange(size, device=device) % 2 == 0
    seen = Evidence(torch.zeros(size, model.classes, device=device))
    step = Step(stop, seen.logits[:, 0], seen.logits, ())
    leaving = int(stop.sum())
    for k in range(model.exits - 1):
        _, carry = stages.run(k, carry)
        found[f"regroup {k}"] = partial(_regrouped, carry, size, step, leaving)
    return found
