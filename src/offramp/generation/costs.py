"""What a token costs, by the exit it leaves at: counted, and measured."""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offramp.cost import CostModel, TimedCosts
from offramp.errors import ValueRangeError
from offramp.generation.given import checked_prompts
from offramp.generation.heads import TokenExits
from offramp.generation.loop import Run
from offramp.generation.rules import TokenPolicy
from offramp.graph import eval_mode
from offramp.machine import machine_line
from offramp.policies import Fixed, MaxProb
from offramp.policies.base import Evidence

__all__ = ["measure_tokens"]


def measure_tokens(
    model: TokenExits, prompts: Sequence[Sequence[int]], *, batch_sizes: Sequence[int] = (1,), rounds: int = 15,
    encoded: Tensor | None = None,
) -> CostModel:  # fmt: skip
    """The costs of a new token: fractions by multiplications, and median seconds of every stage and head here.

    The first stage counts the keys and values of all layers behind it, because each token has to have them somewhen,
    and later stages go without. Measured stages have an earlier token's keys and values to make up, as after a token
    that left at the first exit: what a text with mixed exits pays, or a little more. What attention reads grows with a
    text and is in the times only.

    Args:
        model: from `attach_tokens`.
        prompts: typical ones; they are repeated or cut to each batch size.
        batch_sizes: to be timed; () counts only.
        rounds: turns, alternating, of which medians are taken.
        encoded: what an encoder gave for the prompts.

    Raises:
        ValueRangeError: no prompt, or too long a one for twice as many tokens as there are exits.
    """
    checked_prompts(model, prompts, 2 * model.exits)
    if any(size < 1 for size in batch_sizes) or rounds < 1:
        raise ValueRangeError(f"batch sizes are {tuple(batch_sizes)} and rounds {rounds}; expected at least 1 each.")
    stage, head, plain = _counted(model)
    with eval_mode(model), torch.inference_mode():
        timed = tuple(_timed(model, prompts, size, rounds, encoded) for size in sorted(set(batch_sizes)))
    return CostModel(
        stage=tuple(each / plain for each in stage), head=tuple(each / plain for each in head), plain_flops=2.0 * plain,
        timed=timed, machine=machine_line(),
    )  # fmt: skip


def _weights(module: nn.Module) -> int:
    """Numbers that each token is multiplied with."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def _counted(model: TokenExits) -> tuple[list[float], list[float], float]:
    """(stages, heads, the plain decoder) in multiplications a token."""
    decoder = model.decoder
    layers = [_weights(block) - sum(map(_weights, decoder.once(j))) for j, block in enumerate(decoder.blocks)]
    kept = 2 * decoder.width * decoder.heads * decoder.head_width  # a layer's keys and values
    last = decoder.vocabulary * decoder.width
    ends = [*model.at, decoder.layers - 1]
    begins = [0, *(end + 1 for end in ends[:-1])]
    stage = [float(sum(layers[a : b + 1])) for a, b in zip(begins, ends, strict=True)]
    behind = decoder.layers - ends[0] - 1
    for k in range(1, model.exits):
        stage[k] -= kept * (ends[k] - begins[k] + 1)
    stage[0] += kept * behind
    stage[-1] += last
    return stage, [*(float(_weights(head) or last) for head in model.heads), 0.0], float(sum(layers) + last)


def _timed(
    model: TokenExits, prompts: Sequence[Sequence[int]], size: int, rounds: int, encoded: Tensor | None
) -> TimedCosts:
    """Medians at one batch size."""
    which = [i % len(prompts) for i in range(size)]
    given, memory = [list(prompts[i]) for i in which], None if encoded is None else encoded[which]
    rows, tokens = list(range(size)), [row[-1] for row in given]
    plain: list[float] = []
    until: list[list[float]] = [[] for _ in range(model.exits)]
    heads: list[list[float]] = [[] for _ in model.at]
    lengths, state = [len(row) for row in given], torch.randn(size, model.decoder.width, dtype=_dtype(model))
    state, policy = state.to(next(model.parameters()).device), MaxProb(1.0)
    for turn in range(rounds + 1):
        whole = Run(model, None, lengths, 2 * model.exits, memory)
        early = Run(model, TokenPolicy(Fixed(0, model.exits)), lengths, 2 * model.exits, memory)
        for run in (whole, early):
            run.read(given)
        for k in range(model.exits):
            early.leave_by(TokenPolicy(Fixed(0, model.exits)))
            early.step(rows, tokens)
            early.leave_by(TokenPolicy(Fixed(k, model.exits)))
            seconds = _seconds(early, rows, tokens)
            plains = _seconds(whole, rows, tokens)
            if turn:  # the first is to warm up
                until[k].append(seconds)
                plain.append(plains)
        for k in range(len(model.at)):
            began = time.perf_counter()
            seen = Evidence(model.said(k, state))
            policy.step(k, seen, policy.init(seen)).stop.tolist()
            heads[k].append(time.perf_counter() - began)
    head = [*map(statistics.median, heads), 0.0]
    alone = [statistics.median(each) - beside for each, beside in zip(until, head, strict=True)]
    stage = [max(0.0, b - a) for a, b in zip([0.0, *alone[:-1]], alone, strict=True)]
    quarters = statistics.quantiles(plain, n=4) if len(plain) > 1 else [0.0, 0.0, 0.0]
    return TimedCosts(
        batch_size=size, plain_s=statistics.median(plain), stage_s=tuple(stage), head_s=tuple(head),
        spread_s=quarters[2] - quarters[0],
    )  # fmt: skip


def _dtype(model: TokenExits) -> torch.dtype:
    return next(model.decoder.network.parameters()).dtype


def _seconds(run: Run, rows: list[int], tokens: list[int]) -> float:
    began = time.perf_counter()
    run.step(rows, tokens)[0].argmax(-1).tolist()
    return time.perf_counter() - began
