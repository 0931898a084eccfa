"""The attach test: every later stage, run on a subset of the rows, gives the original's output for that subset."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from offramp.errors import NotStageable
from offramp.graph import first_line
from offramp.inputs import Inputs, select_rows
from offramp.stages import Carry, Stages

__all__ = ["verify"]

# of three rows; one alone, because that is where a batch often ends; the others so that no reversal or turn maps the
# subsets onto themselves
SUBSETS = ([2, 0], [1], [0, 1])
TOLERANCE = {torch.bfloat16: 1e-1, torch.float16: 2e-2}  # relative to the largest value; 1e-4 for wider types
HAND = "Tap other modules, or give attach(..., stages=[...])."
ROWS = "A row's answer must depend on its inputs and weights alone, not on its neighbours or on earlier calls."


def verify(
    stages: Stages, plain: Callable[[Inputs], Tensor], example: Inputs, taps: Sequence[str], expected: Sequence[Tensor]
) -> None:
    """Nothing, when the stages agree with the original on all rows and on subsets of them.

    Args:
        stages: what was cut.
        plain: the original, inputs to logits, in eval mode.
        example: inputs of three different rows.
        taps: the taps' names.
        expected: the original's taps and its logits on the example.

    Raises:
        NotStageable: they differ, or cannot be run.
    """
    subsets = [torch.tensor(rows, device=expected[-1].device) for rows in SUBSETS]
    try:
        alone = [plain(select_rows(example, index)) for index in subsets]
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise NotStageable(
            f"The model cannot be cut: it does not run on some of its rows: {first_line(error)} {ROWS}"
        ) from error
    for index, logits in zip(subsets, alone, strict=True):
        # a softmax over the rows keeps an axis for them, so that only a run shows it
        if apart := _apart(logits, expected[-1][index]):
            raise NotStageable(
                f"The model cannot be cut: it mixes rows. Its own logits of rows {index.tolist()} of 3 {apart} "
                f"when they are run without the others. {ROWS}"
            )
    try:
        _run(stages, example, taps, expected, subsets, alone)
    except (RuntimeError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, NotStageable):
            raise
        raise NotStageable(f"The model was cut, but its stages do not run: {first_line(error)} {HAND}") from error


def _run(
    stages: Stages,
    example: Inputs,
    taps: Sequence[str],
    expected: Sequence[Tensor],
    subsets: Sequence[Tensor],
    alone: Sequence[Tensor],
) -> None:
    carry = stages.start(example)
    for k, name in enumerate(taps):
        tap, onward = stages.run(k, carry)
        if apart := _apart(tap, expected[k]):
            raise NotStageable(f"The model was cut, but the values of stage {k} at tap {name!r} {apart}. {HAND}")
        if onward is None:
            raise NotStageable(f"The model was cut, but nothing goes on behind tap {name!r}. {HAND}")
        for index, logits in zip(subsets, alone, strict=True):
            if apart := _apart(_finish(stages, k + 1, onward.select(index)), logits):
                raise NotStageable(
                    f"The model was cut, but what follows tap {name!r}, run on rows {index.tolist()} of 3, "
                    f"gives logits that {apart}. {ROWS} {HAND}"
                )
        carry = onward


def _finish(stages: Stages, k: int, carry: Carry | None) -> Tensor:
    """The logits from the carry into stage k."""
    out = torch.empty(0)
    while carry is not None:
        out, carry = stages.run(k, carry)
        k += 1
    return out


def _apart(got: Tensor, expected: Tensor) -> str:
    """How far two tensors are apart, in words, or "" when they agree."""
    if got.shape != expected.shape:
        return f"have shape {list(got.shape)} and not {list(expected.shape)}"
    if not got.numel():
        return ""
    most = (got.double() - expected.double()).abs().max().item()
    scale = max(expected.double().abs().max().item(), 1e-6)
    if most <= TOLERANCE.get(expected.dtype, 1e-4) * scale:
        return ""
    return f"differ from the original by {most:.2g} (largest value {scale:.2g})"
