"""What a model costs here: FLOPs per row, and seconds of every stage and head at given batch sizes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from offramp.cost import CostModel, TimedCosts
from offramp.errors import ValueRangeError
from offramp.inputs import Inputs, batch_size, select_rows, tensors_of
from offramp.machine import alternate, machine_line, waiter
from offramp.model import ExitModel

__all__ = ["measure", "repeat_rows"]


def measure(
    model: ExitModel,
    inputs: Inputs,
    *,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
    rounds: int = 15,
    seconds: float = 1.0,
) -> CostModel:
    """The model's costs: fractions by FLOPs (torch's counter), and median seconds in alternating runs.

    The plain model is timed twice, as the user wrote it and as the exported graph that the stages are cut from; the
    faster counts, so that exits cannot win by what the export alone saves.

    Args:
        model: from `attach`; it is run in eval mode.
        inputs: typical rows, e.g. of the usual text length. They are repeated or cut to each batch size.
        batch_sizes: sizes to time; () counts FLOPs only. Times in between are interpolated.
        rounds, seconds: at most so many turns per size, and about so long.

    Raises:
        ValueRangeError: no rows, or a batch size below 1.
        NotStageable: the model cannot be cut.
    """
    if batch_size(inputs) == 0 or any(size < 1 for size in batch_sizes):
        raise ValueRangeError(f"measuring needs at least one row and sizes of at least 1; got {tuple(batch_sizes)}.")
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            stage, head, plain = _flops(model, inputs)
            timed = tuple(_times(model, inputs, size, rounds, seconds) for size in sorted(set(batch_sizes)))
    finally:
        model.train(training)
    rows = batch_size(inputs)
    return CostModel(
        stage=tuple(f / plain for f in stage),
        head=tuple(f / plain for f in head),
        plain_flops=plain / rows,
        timed=timed,
        machine=machine_line() if timed else "",
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


def _times(model: ExitModel, inputs: Inputs, size: int, rounds: int, seconds: float) -> TimedCosts:
    stages, batch = model.stages(), repeat_rows(inputs, size)
    contenders: dict[str, Any] = {"plain": lambda: model.plain(batch), "whole": lambda: stages.whole(batch)}
    carry = stages.start(batch)
    for k in range(model.exits):
        contenders[f"stage {k}"] = lambda k=k, carry=carry: stages.run(k, carry)
        tap, after = stages.run(k, carry)
        if after is not None:
            contenders[f"head {k}"] = lambda k=k, tap=tap, mask=after.mask: model.head_logits(k, tap, mask)
            carry = after
    took = alternate(contenders, rounds=rounds, seconds=seconds, after=waiter(inputs))
    plain = min(took["plain"], took["whole"], key=lambda t: t.median_s)
    return TimedCosts(
        batch_size=size,
        plain_s=plain.median_s,
        stage_s=tuple(took[f"stage {k}"].median_s for k in range(model.exits)),
        head_s=tuple(took[f"head {k}"].median_s if f"head {k}" in took else 0.0 for k in range(model.exits)),
        spread_s=plain.spread_s,
    )
