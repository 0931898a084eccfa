"""Training under the keys and values that exits leave behind.

A token that left early stands in the cache of later layers with its hidden state at the exit. A decoder that has
learned from whole texts alone has never seen such keys, and says worse words behind them. Here a pass over given texts
lets tokens leave, so that every exit of every token learns behind what generation will have left there.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["rehearsed"]

DEPTH = 4.0  # thresholds of rows are from 0 to 1 - 10 ** -DEPTH, evenly in the exponent


class _Mixed:
    """Stores what the tokens of whole texts see: of those before them the keys as exits left them, of themselves their
    own."""

    def __init__(self, model: Any, hidden: Tensor, positions: Tensor) -> None:
        self.decoder, self.positions, self.state = model.decoder, positions, hidden
        self.left = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        each = torch.eye(hidden.shape[1], dtype=torch.bool, device=hidden.device)
        before = torch.ones_like(each).tril(-1)
        self.alone, self.both = before | each, torch.cat([before, each], dim=1)

    def leave(self, now: Tensor, hidden: Tensor) -> None:
        """Nothing; these tokens [row token] stay as they are here, but those that have left before."""
        new = now & ~self.left
        self.state = torch.where(new[..., None], hidden, self.state)
        self.left = self.left | new

    def __call__(self, j: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not bool(self.left.any()):
            return keys, values, self.alone
        found = self.decoder.keys_values(j, self.state, self.positions)
        left = self.left[:, None, :, None]
        kept = (torch.where(left, stale.to(own.dtype), own) for stale, own in zip(found, (keys, values), strict=True))
        keys, values = (torch.cat([mixed, own], dim=2) for mixed, own in zip(kept, (keys, values), strict=True))
        return keys, values, self.both


def rehearsed(
    model: Any, inputs: Mapping[str, Tensor], thresholds: Float[Tensor, "row"] | None = None
) -> Float[Tensor, "exit token cls"]:
    """As a model's own forward, but behind tokens that left where their largest probability reached a threshold.

    Args:
        model: from `attach_tokens`.
        inputs: as its forward takes them.
        thresholds: of each row; unless given they are drawn, from rows whose tokens all leave at the first exit to rows
            that hardly ever do.

    Source: ours; CALM (Schuster et al. 2022) trains on whole states and bears the difference.
    """
    ids, kept = inputs["input_ids"], inputs["attention_mask"][:, 1:].bool()
    decoder, encoded = model.decoder, model.looked_at(inputs)
    memory = None if encoded is None else decoder.memory(encoded)
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    hidden = decoder.embed(ids, positions)
    store, said = _Mixed(model, hidden, positions), list[Tensor]()
    if thresholds is None:
        thresholds = 1 - 10 ** -(DEPTH * torch.rand(len(ids), device=ids.device))
    for j in range(decoder.layers):
        hidden = decoder.layer(j, hidden, positions, store, memory)
        if j in model.at:
            said.append(model.said(len(said), hidden[:, :-1][kept]))
            now = torch.zeros_like(store.left)
            sure = said[-1].detach().float().softmax(-1).amax(-1)
            now[:, :-1][kept] = sure >= thresholds[:, None].expand_as(kept)[kept]
            store.leave(now, hidden)
    said.append(model.said(model.exits - 1, hidden[:, :-1][kept]))
    return torch.stack(said)
