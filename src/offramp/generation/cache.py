"""Keys and values of rows whose tokens left at different layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.generation.decoders import Decoder

__all__ = ["TokenCache"]

GROWTH = 64  # tokens


class TokenCache:
    """Keys and values of every layer and row, in the rows' own positions, and what skipped layers still owe.

    A token that left before layer j has no keys and values there yet. Its hidden state at the exit is kept, and when
    layer j next runs for its row, all that the row owes there is made up in one product (deferred filling), from the
    same hidden states and with the same products as at once.

    Args:
        decoder: whose layers these are.
        rows: of the batch.
        room: tokens to make room for at first; it grows.
        at_once: fill skipped layers when a token leaves, and not later: the same values, more work.
    """

    def __init__(self, decoder: Decoder, rows: int, room: int = GROWTH, *, at_once: bool = False) -> None:
        weight = next(decoder.network.parameters())
        self.decoder, self.at_once = decoder, at_once
        self.keys = weight.new_zeros((decoder.layers, rows, decoder.heads, room, decoder.head_width))
        self.values = torch.zeros_like(self.keys)
        self.left_with = weight.new_zeros((rows, room, decoder.width))  # hidden states at the exits
        self.filled = [[0] * rows for _ in range(decoder.layers)]  # tokens of each layer and row that are there

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.keys.shape[1]

    @property
    def room(self) -> int:
        """Tokens that there is room for."""
        return self.keys.shape[3]

    def grow(self, tokens: int) -> None:
        """Nothing; there is room for so many tokens."""
        if tokens <= self.room:
            return
        more = max(tokens, self.room * 2) - self.room

        def wider(old: Tensor, dim: int) -> Tensor:
            shape = list(old.shape)
            shape[dim] = more
            return torch.cat([old, old.new_zeros(shape)], dim)

        self.keys, self.values = wider(self.keys, 3), wider(self.values, 3)
        self.left_with = wider(self.left_with, 1)

    def left(self, rows: Sequence[int], positions: Sequence[int], hidden: Tensor, after: int) -> None:
        """Nothing; these rows' tokens left behind layer `after` with these hidden states [row dim]."""
        if len(rows) == 1:
            self.left_with[rows[0], positions[0]] = hidden[0]
        else:
            self.left_with[list(rows), list(positions)] = hidden
        if self.at_once:
            for j in range(after + 1, self.decoder.layers):
                self.fill(j, rows, [position + 1 for position in positions])

    def fill(self, j: int, rows: Sequence[int], until: Sequence[int]) -> None:
        """Nothing; layer j has what these rows owe before the positions `until`: one product for all of it."""
        filled = self.filled[j]
        owed = [(row, p) for row, end in zip(rows, until, strict=True) for p in range(filled[row], end)]
        if not owed:
            return
        first, begin, end = owed[0][0], owed[0][1], owed[-1][1] + 1
        if owed[-1][0] == first:  # one row: slices instead of gathering
            spots = torch.arange(begin, end, device=self.keys.device)[None]
            keys, values = self.decoder.keys_values(j, self.left_with[first : first + 1, begin:end], spots)
            self.keys[j, first, :, begin:end], self.values[j, first, :, begin:end] = keys[0], values[0]
        else:
            place, spots = torch.tensor(owed, device=self.keys.device).T
            keys, values = self.decoder.keys_values(j, self.left_with[place, spots][None], spots[None])
            self.keys[j, place, :, spots], self.values[j, place, :, spots] = (
                keys[0].transpose(0, 1),
                values[0].transpose(0, 1),
            )
        for row, stop in zip(rows, until, strict=True):
            filled[row] = max(filled[row], stop)

    def step(self, rows: Sequence[int], positions: Sequence[int]) -> "_Step":
        """The store of one new token for each of these rows, at their positions."""
        return _Step(self, list(rows), list(positions))

    def prompts(self, lengths: Sequence[int]) -> "_Prompts":
        """The store of the prompts of all rows at once, padded behind; their first tokens are at position 0."""
        return _Prompts(self, list(lengths))

    def several(self, begin: int, count: int) -> "_Several":
        """The store of `count` tokens of the only row, from position `begin` on."""
        return _Several(self, begin, count)

    def forget(self, tokens: int) -> None:
        """Nothing; of the only row, just its first `tokens` are there."""
        for filled in self.filled:
            filled[0] = min(filled[0], tokens)

    def reorder(self, rows: Sequence[int]) -> None:
        """Nothing; row i is what row `rows[i]` was, as beams need it."""
        index = torch.as_tensor(rows, device=self.keys.device)
        self.keys, self.values = self.keys[:, index], self.values[:, index]
        self.left_with = self.left_with[index]
        self.filled = [[filled[row] for row in rows] for filled in self.filled]


class _Prompts:
    """Stores whole prompts: every layer sees each token and those before it."""

    def __init__(self, cache: TokenCache, lengths: list[int]) -> None:
        cache.grow(max(lengths))
        self.cache, self.lengths = cache, lengths

    def __call__(self, j: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        cache, tokens = self.cache, keys.shape[2]
        cache.keys[j, :, :, :tokens], cache.values[j, :, :, :tokens] = keys, values
        cache.filled[j] = list(self.lengths)
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=keys.device).tril() if tokens > 1 else None
        return keys, values, mask


class _Several:
    """Stores some tokens of the only row: each sees those before it."""

    def __init__(self, cache: TokenCache, begin: int, count: int) -> None:
        self.cache, self.begin, self.end, self.mask = cache, begin, begin + count, None
        cache.grow(self.end)
        if count > 1:
            spots = torch.arange(self.end, device=cache.keys.device)
            self.mask = spots <= spots[begin:, None]

    def __call__(self, j: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        cache, begin, end = self.cache, self.begin, self.end
        cache.keys[j, :, :, begin:end], cache.values[j, :, :, begin:end] = keys, values
        cache.filled[j][0] = end
        return cache.keys[j, :, :, :end], cache.values[j, :, :, :end], self.mask


class _Step:
    """Stores one token of some rows; each row sees its own tokens up to this one."""

    def __init__(self, cache: TokenCache, rows: list[int], positions: list[int]) -> None:
        cache.grow(max(positions) + 1)
        self.cache, self.rows, self.positions = cache, rows, positions
        self.whole = rows == list(range(cache.rows))
        self.longest = max(positions) + 1
        self.even = len(set(positions)) == 1
        if not self.whole or not self.even:
            device = cache.keys.device
            self.index, self.spots = torch.tensor(rows, device=device), torch.tensor(positions, device=device)
        self.mask = None
        if not self.even:
            self.mask = (torch.arange(self.longest, device=device) <= self.spots[:, None])[:, None, None]

    def __call__(self, j: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        cache, end = self.cache, self.longest
        cache.fill(j, self.rows, self.positions)
        if self.whole and self.even:
            cache.keys[j, :, :, end - 1 : end], cache.values[j, :, :, end - 1 : end] = keys, values
        else:
            cache.keys[j, self.index, :, self.spots] = keys[:, :, 0]
            cache.values[j, self.index, :, self.spots] = values[:, :, 0]
        filled = cache.filled[j]
        for row, position in zip(self.rows, self.positions, strict=True):
            filled[row] = position + 1
        if self.whole:
            return cache.keys[j, :, :, :end], cache.values[j, :, :, :end], self.mask
        return cache.keys[j, self.index, :, :end], cache.values[j, self.index, :, :end], self.mask
