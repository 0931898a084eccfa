"""Keys and values of rows whose tokens left at different layers."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from offramp.generation.decoders import Decoder
from offramp.generation.picking import pick, picked

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
        # tokens before heads, so that a row's token is one place to write, and one to read
        self.keys = weight.new_zeros((decoder.layers, rows, room, decoder.heads, decoder.head_width))
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
        return self.keys.shape[2]

    def grow(self, tokens: int) -> None:
        """Nothing; there is room for so many tokens."""
        if tokens <= self.room:
            return
        more = max(tokens, self.room * 2) - self.room

        def wider(old: Tensor, dim: int) -> Tensor:
            shape = list(old.shape)
            shape[dim] = more
            return torch.cat([old, old.new_zeros(shape)], dim)

        self.keys, self.values = wider(self.keys, 2), wider(self.values, 2)
        self.left_with = wider(self.left_with, 1)

    def left(self, rows: Sequence[int], positions: Sequence[int], hidden: Tensor, after: int) -> None:
        """Nothing; these rows' tokens left behind layer `after` with these hidden states [row dim]."""
        if len(rows) == 1:
            self.left_with[rows[0], positions[0]] = hidden[0]
        else:
            self._flat(self.left_with).index_copy_(0, self.places(rows, positions), hidden)
        if self.at_once:
            for j in range(after + 1, self.decoder.layers):
                self.fill(j, rows, [position + 1 for position in positions])

    def fill(self, j: int, rows: Sequence[int], until: Sequence[int]) -> None:
        """Nothing; layer j has what these rows owe before the positions `until`: one product for all of it."""
        filled = self.filled[j]
        owed = [(row, filled[row], end) for row, end in zip(rows, until, strict=True) if filled[row] < end]
        if not owed:
            return
        if len(owed) == 1:  # slices instead of gathering
            row, begin, end = owed[0]
            spots = torch.arange(begin, end, device=self.keys.device)[None]
            keys, values = self.decoder.keys_values(j, self.left_with[row : row + 1, begin:end], spots)
            self.keys[j, row, begin:end] = keys[0].transpose(0, 1)
            self.values[j, row, begin:end] = values[0].transpose(0, 1)
        else:
            which, at = zip(*((row, p) for row, begin, end in owed for p in range(begin, end)), strict=True)
            places, spots = self.places(which, at), torch.tensor(at, device=self.keys.device)
            states = self._flat(self.left_with).index_select(0, places)
            self.put(j, places, *self.decoder.keys_values(j, states[None], spots[None]))
        for row, _, end in owed:
            filled[row] = end

    def places(self, rows: Sequence[int], positions: Sequence[int]) -> Int[Tensor, "token"]:
        """Where these tokens are, were all rows one behind the other."""
        room = self.room
        found = [row * room + position for row, position in zip(rows, positions, strict=True)]
        return torch.tensor(found, device=self.keys.device)

    def put(self, j: int, places: Int[Tensor, "token"], keys: Tensor, values: Tensor) -> None:
        """Nothing; layer j has these keys and values at these places, in their order."""
        for whole, new in ((self.keys, keys), (self.values, values)):
            self._flat(whole[j]).index_copy_(0, places, new.transpose(1, 2).flatten(0, 1))

    @staticmethod
    def _flat(whole: Tensor) -> Tensor:
        """All tokens of all rows, one behind the other: always a view, as it is written to."""
        return whole.view(-1, *whole.shape[2:])

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
        cache.keys[j, :, :tokens], cache.values[j, :, :tokens] = keys.transpose(1, 2), values.transpose(1, 2)
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
        cache.keys[j, :, begin:end], cache.values[j, :, begin:end] = keys.transpose(1, 2), values.transpose(1, 2)
        cache.filled[j][0] = end
        return cache.keys[j, :, :end].transpose(1, 2), cache.values[j, :, :end].transpose(1, 2), self.mask


class _Step:
    """Stores one token of some rows; each row sees its own tokens up to this one."""

    def __init__(self, cache: TokenCache, rows: list[int], positions: list[int]) -> None:
        cache.grow(max(positions) + 1)
        self.cache, self.rows, self.positions = cache, rows, positions
        device, self.longest = cache.keys.device, max(positions) + 1
        self.picked, self.mask = picked(rows, cache.rows, device), None
        even = len(set(positions)) == 1
        self.places = None if even and isinstance(self.picked, slice) else cache.places(rows, positions)
        if not even:
            ends = torch.tensor(positions, device=device)
            self.mask = (torch.arange(self.longest, device=device) <= ends[:, None])[:, None, None]

    def __call__(self, j: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        cache, end = self.cache, self.longest
        cache.fill(j, self.rows, self.positions)
        if self.places is None:
            cache.keys[j, self.picked, end - 1] = keys[:, :, 0]
            cache.values[j, self.picked, end - 1] = values[:, :, 0]
        else:
            cache.put(j, self.places, keys, values)
        filled = cache.filled[j]
        for row, position in zip(self.rows, self.positions, strict=True):
            filled[row] = position + 1
        return self._of(cache.keys[j]), self._of(cache.values[j]), self.mask

    def _of(self, whole: Tensor) -> Tensor:
        """What these rows see of a layer's keys or values."""
        return pick(whole[:, : self.longest], self.picked).transpose(1, 2)
