"""What every exit said of every token, small enough to calibrate policies on."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from offramp.errors import ValueRangeError
from offramp.generation.heads import TokenExits
from offramp.graph import eval_mode
from offramp.meter import Meter
from offramp.tokenrows import TokenRows, next_tokens
from offramp.trace import ExitTrace

__all__ = ["compact", "record_tokens", "sequences_of"]

NOTHING = -1e4  # the logit of a place without a token


def record_tokens(
    model: TokenExits, rows: TokenRows, *, top: int = 2, others: int = 32, batch_size: int = 8, progress: bool = True
) -> ExitTrace:
    """A trace with a row for every token that is to be said, read in one pass over given texts.

    A vocabulary at every exit is too large to keep. A row has as classes the `top` tokens of every exit, the token
    that comes, and `others` places that share what is left, so that the largest probabilities, their lead and who
    agrees with whom are what they were: what max-prob, margin, patience, BEEM and stopping look at. Entropy is smaller
    than over the whole vocabulary, so that its thresholds hold for such traces alone; policies that know classes by
    their number (ZTW, EENet, JEI-DNN and others) cannot be made of them.

    The states that exits read here are those of the whole decoder; while it generates, later layers see what tokens
    that left early have left behind. Policies are calibrated on a trace, and judged by `score` or `generate`.

    Args:
        model: from `attach_tokens`.
        rows: texts; a token's id in the trace is "row.place".

    Raises:
        ValueRangeError: top, others or batch_size is below 1, or a row too long for the decoder.
    """
    if not 1 <= top <= model.classes or others < 1 or batch_size < 1:
        raise ValueRangeError(
            f"top is {top}, others {others} and batch_size {batch_size}; expected at least 1 each, and of top at most "
            f"the vocabulary, {model.classes}."
        )
    device = next(model.parameters()).device
    logits, labels, ids = [], [], list[str]()
    parts = torch.arange(len(rows)).split(batch_size)
    with eval_mode(model), torch.inference_mode(), Meter("recording", len(parts), progress) as meter:
        for part in parts:
            batch = rows.batch(part)
            said = model({name: value.to(device) for name, value in batch.inputs.items()})
            target = next_tokens(batch).to(device)
            small, label = compact(said, target, top=top, others=others)
            logits.append(small.cpu())
            labels.append(label.cpu())
            ids += [f"{row}.{place}" for row in part.tolist() for place in range(1, int(rows.lengths[row]))]
            meter.advance()
    return ExitTrace(torch.cat(logits, 1), torch.cat(labels), ids=tuple(ids))


def compact(
    logits: Float[Tensor, "exit token cls"], target: Int64[Tensor, "token"], *, top: int = 2, others: int = 32
) -> tuple[Float[Tensor, "exit token place"], Int64[Tensor, "token"]]:
    """(log-probabilities of a few tokens and of places for the rest, the target's place), a row of places per token."""
    logs = logits.float().log_softmax(-1)
    best = logs.topk(top, dim=-1)
    tokens = torch.cat([target[:, None], best.indices.permute(1, 0, 2).flatten(1)], dim=1)
    tokens = tokens.sort(dim=1).values
    again = torch.zeros_like(tokens, dtype=torch.bool)
    again[:, 1:] = tokens[:, 1:] == tokens[:, :-1]
    kept = logs.gather(-1, tokens.expand(len(logs), -1, -1)).masked_fill(again, NOTHING)
    rest = (1 - kept.exp().sum(-1, keepdim=True)).clamp(min=1e-12)
    # no token of the rest is likelier than the last one of the best
    each = torch.minimum((rest / others).log(), best.values[..., -1:])
    place = ((tokens == target[:, None]) & ~again).int().argmax(1)
    return torch.cat([kept, each.expand(-1, -1, others)], dim=-1), place


def sequences_of(trace: ExitTrace) -> Int64[Tensor, "row"]:
    """The number of the text that every row of a token trace is from.

    Raises:
        ValueRangeError: the trace has no ids of tokens.
    """
    if trace.ids is None or not trace.of_tokens:
        raise ValueRangeError("the trace has no ids such as '12.3', row and place; record it with record_tokens.")
    return torch.tensor([int(name.partition(".")[0]) for name in trace.ids])
