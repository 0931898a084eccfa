"""Generation without any cache: slow, short, and what the fast one is tested against."""

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.generation.given import Ends, ends_of
from offramp.generation.heads import TokenExits
from offramp.generation.loop import Generated
from offramp.generation.rules import TokenPolicy, as_rule
from offramp.graph import eval_mode
from offramp.policies.base import Evidence, Policy, State

__all__ = ["generate_without_cache"]


@torch.inference_mode()
def generate_without_cache(
    model: TokenExits, policy: Policy | TokenPolicy | None, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
    end: Ends = None, encoded: Tensor | None = None,
) -> Generated:  # fmt: skip
    """As `generate`, greedily, one row after the other, with everything computed anew for every token.

    A token that left behind layer e has, in all later layers, the hidden state that it left with.
    """
    tokens, exits, ends = [], [], ends_of(end, model.classes)
    rule = as_rule(policy, model.exits, gates=model.gates is not None)
    with eval_mode(model):
        for row, prompt in enumerate(prompts):
            memory = None if encoded is None else encoded[row : row + 1]
            said = _row(model, rule, list(prompt), max_new_tokens, ends, memory)
            tokens.append(said[0])
            exits.append(said[1])
    return Generated(tuple(tokens), tuple(exits))


def _row(
    model: TokenExits, rule: TokenPolicy | None, ids: list[int], new: int, ends: frozenset[int], encoded: Tensor | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    decoder, prompt = model.decoder, len(ids)
    left = [decoder.layers - 1] * prompt  # behind which layer each token left
    exits: list[int] = []
    while True:
        logits, exit_, left[-1] = _whole(model, ids, left, rule, encoded, len(exits), new)
        exits.append(exit_)
        ids.append(int(logits.argmax()))
        left.append(decoder.layers - 1)
        if len(exits) == new or ids[-1] in ends:
            return tuple(ids[prompt:]), tuple(exits)


def _whole(
    model: TokenExits, ids: list[int], left: list[int], rule: TokenPolicy | None, encoded: Tensor | None, token: int,
    most: int,
) -> tuple[Tensor, int, int]:  # fmt: skip
    """(logits behind the last token, its exit, its layer), with the earlier tokens held where they left."""
    decoder = model.decoder
    device = next(model.parameters()).device
    positions = torch.arange(len(ids), device=device)[None]
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool, device=device).tril()
    memory = None if encoded is None else decoder.memory(encoded)
    hidden = decoder.embed(torch.tensor([ids], device=device), positions)
    behind = {j: k for k, j in enumerate(model.at)}
    policy = None if rule is None else rule.at(token, most)
    wanted = () if rule is None else rule.visited(model.exits)
    state: State | None = None
    for j in range(decoder.layers):
        after = decoder.layer(j, hidden, positions, lambda _, keys, values: (keys, values, mask), memory)
        stays = torch.tensor([layer < j for layer in left], device=device)[None, :, None]
        hidden = torch.where(stays, hidden, after)
        k = behind.get(j)
        if policy is not None and k in wanted and k is not None and model.opened(k, hidden[:, -1], rule) != [False]:
            seen = Evidence(model.said(k, hidden[:, -1]))
            step = policy.step(k, seen, policy.init(seen) if state is None else state)
            state = step.state
            if bool(step.stop):
                return step.answer[0], k, j
    said = model.said(model.exits - 1, hidden[:, -1])
    if policy is not None:
        seen = Evidence(said)
        said = policy.step(model.exits - 1, seen, policy.init(seen) if state is None else state).answer
    return said[0], model.exits - 1, decoder.layers - 1
