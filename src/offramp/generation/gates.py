"""Gates: small tests of whether an exit's vocabulary is worth looking at."""

import torch
from torch import Tensor, nn

from offramp.errors import DataError
from offramp.generation.heads import TokenExits
from offramp.graph import eval_mode
from offramp.meter import Meter
from offramp.tokenrows import TokenRows

__all__ = ["learn_gates"]


def learn_gates(
    model: TokenExits, rows: TokenRows, *, tokens: int = 20_000, batch_size: int = 16, progress: bool = True
) -> tuple[float, ...]:
    """How often each gate tells apart, on the tokens it learned from, where its exit says what the last one says.

    A gate is a logistic regression from an exit's hidden state, which costs next to nothing beside a vocabulary. The
    model has the gates afterwards; `TokenPolicy(policy, gate=p)` uses them.

    Args:
        model: with trained heads; its own weights stay as they are.
        rows: sequences to learn from; the first ones that have so many tokens.

    Raises:
        DataError: an exit always says what the last one says, or never does, on these tokens.
    """
    states, right = _seen(model, rows, tokens, batch_size, progress)
    gates, found = [], []
    for k, (hidden, target) in enumerate(zip(states, right, strict=True)):
        if target.all() or not target.any():
            raise DataError(
                f"exit {k} {'always' if target.all() else 'never'} says what the last exit says on these "
                f"{len(target)} tokens, so there is nothing to tell apart. Give more rows, or train the heads first."
            )
        gate = _fitted(hidden, target)
        gates.append(gate)
        found.append(float(((gate(hidden)[:, 0] >= 0) == target).float().mean()))
    model.gates = nn.ModuleList(gates).to(model.decoder.head.weight)
    return tuple(found)


def _seen(
    model: TokenExits, rows: TokenRows, tokens: int, batch_size: int, progress: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """(hidden states, whether its answer is the last exit's) of every exit."""
    device = next(model.parameters()).device
    states: list[list[Tensor]] = [[] for _ in model.at]
    right: list[list[Tensor]] = [[] for _ in model.at]
    count = int((rows.lengths.cumsum(0) - torch.arange(1, len(rows) + 1) < tokens).sum()) + 1
    parts = torch.arange(min(count, len(rows))).split(batch_size)
    with eval_mode(model), torch.inference_mode(), Meter("gates", len(parts), progress) as meter:
        for part in parts:
            batch = rows.batch(part)
            hidden, last = model.states({name: value.to(device) for name, value in batch.inputs.items()})
            answer = last.argmax(-1)
            for k, (state, head) in enumerate(zip(hidden, model.heads, strict=True)):
                states[k].append(state.float().cpu())
                right[k].append((head(state).argmax(-1) == answer).cpu())
            meter.advance()
    return [torch.cat(each).clone() for each in states], [torch.cat(each).clone() for each in right]


def _fitted(hidden: Tensor, target: Tensor) -> nn.Linear:
    """A logistic regression on standardised states, folded into one matrix."""
    mean, scale = hidden.mean(0), hidden.std(0) + 1e-6
    seen, wanted = (hidden - mean) / scale, target.float()
    with torch.enable_grad():
        weight, bias = torch.zeros(hidden.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = nn.functional.binary_cross_entropy_with_logits(seen @ weight + bias, wanted)
            value = value + 1e-3 * weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(loss)  # type: ignore[arg-type]
    gate = nn.Linear(hidden.shape[1], 1)
    with torch.no_grad():
        gate.weight.copy_(weight / scale)
        gate.bias.copy_(bias - (weight * mean / scale).sum())
    return gate
