"""Generation in which every token leaves at an exit of its own, and rows that go on go on alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.errors import ShapeError, ValueRangeError
from offramp.generation.cache import TokenCache
from offramp.generation.heads import TokenExits
from offramp.graph import eval_mode
from offramp.policies.base import Evidence, Policy, State, check_exits, visits

__all__ = ["Generated", "Scored", "generate", "score"]


@dataclass(frozen=True, eq=False)
class Generated:
    """What was generated.

    Args:
        tokens: the new tokens of every row, its end token included where it came.
        exits: the exit that each of them left at, 0-based; the first new token comes from the whole decoder.
    """

    tokens: tuple[tuple[int, ...], ...]
    exits: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Scored:
    """How likely given tokens were.

    Args:
        losses: the negative log-likelihood of every token that was scored, in nats.
        exits: the exit that each was said at.
    """

    losses: tuple[tuple[float, ...], ...]
    exits: tuple[tuple[int, ...], ...]

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of all tokens."""
        return math.exp(sum(map(sum, self.losses)) / sum(map(len, self.losses)))


def generate(
    model: TokenExits,
    policy: Policy | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 32,
    end: int | None = None,
    encoded: Float[Tensor, "row memory dim"] | None = None,
    choose: Callable[[Tensor], Tensor] | None = None,
    at_once: bool = False,
) -> Generated:
    """New tokens for every prompt, each token leaving at the first exit at which the policy says so.

    Args:
        model: from `attach_tokens`.
        policy: made for as many exits; None runs every layer and no head but the last.
        prompts: token numbers, a row each; lengths may differ.
        max_new_tokens: at most so many in each row.
        end: the token after which a row is done.
        encoded: what an encoder gave, for decoders that look at it.
        choose: from logits [row token] to tokens [row]; the likeliest unless given.
        at_once: fill the keys and values of skipped layers when a token leaves and not when they are next needed.

    Raises:
        ValueRangeError: a prompt is empty or too long for the decoder, or has a number that is no token.
        ShapeError: the policy is for another number of exits.
    """
    lengths = _checked(model, prompts, max_new_tokens)
    _check_policy(model, policy)
    with eval_mode(model), torch.inference_mode():
        run = _Run(model, policy, lengths, max_new_tokens, encoded, at_once)
        chosen = choose or _likeliest
        return run.go(prompts, [max_new_tokens] * len(lengths), end, lambda _, logits: chosen(logits).tolist())


def score(
    model: TokenExits,
    policy: Policy | None,
    rows: Sequence[Sequence[int]],
    *,
    encoded: Float[Tensor, "row memory dim"] | None = None,
    given: int = 1,
) -> Scored:
    """How likely the tokens of given rows are, each said behind those before it as the exits have left them.

    Args:
        model, policy, encoded: as for `generate`.
        rows: token numbers, a row each, of more than `given` tokens.
        given: so many at the beginning are read and not scored.

    Raises:
        ValueRangeError, ShapeError: as `generate`; or a row has nothing to score.
    """
    if any(len(row) <= given for row in rows) or given < 1:
        raise ValueRangeError(f"every row needs more than given={given} tokens, which has to be at least 1.")
    prompts, rest = [row[:given] for row in rows], [list(row[given:]) for row in rows]
    most = max(map(len, rest), default=0)
    lengths = _checked(model, prompts, most)
    _checked(model, rest, 1)
    _check_policy(model, policy)
    losses: list[list[float]] = [[] for _ in rows]

    def said(going: list[int], logits: Tensor) -> list[int]:
        tokens = [rest[row][len(losses[row])] for row in going]
        found = -logits.log_softmax(-1)[torch.arange(len(going)), torch.tensor(tokens)]
        for row, loss in zip(going, found.tolist(), strict=True):
            losses[row].append(loss)
        return tokens

    with eval_mode(model), torch.inference_mode():
        run = _Run(model, policy, lengths, most, encoded, False)
        exits = run.go(prompts, [len(row) for row in rest], None, said).exits
    return Scored(tuple(map(tuple, losses)), exits)


def _check_policy(model: TokenExits, policy: Policy | None) -> None:
    if policy is not None:
        check_exits(policy, model.exits)
        if policy.needs:
            raise ShapeError(f"{type(policy).__name__} needs signals, which token exits do not have.")


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def _checked(model: TokenExits, prompts: Sequence[Sequence[int]], new: int) -> list[int]:
    """The lengths of the prompts."""
    lengths = [len(prompt) for prompt in prompts]
    context, vocabulary = model.decoder.context, model.classes
    if not lengths or min(lengths) == 0:
        raise ValueRangeError(
            f"there are {len(lengths)} prompts, the shortest of 0 tokens; expected at least one each."
        )
    if new < 1:
        raise ValueRangeError(f"max_new_tokens is {new}; expected at least 1.")
    if max(lengths) + new > context:
        raise ValueRangeError(
            f"a prompt of {max(lengths)} tokens and {new} new ones make {max(lengths) + new}; the decoder has room for "
            f"{context}. Shorten the prompt, or ask for fewer."
        )
    for prompt in prompts:
        if not all(0 <= token < vocabulary for token in prompt):
            raise ValueRangeError(f"a prompt has a token that is not in 0 to {vocabulary - 1}: the vocabulary's size.")
    return lengths


class _Run:
    """One call of `generate`."""

    def __init__(
        self, model: TokenExits, policy: Policy | None, lengths: list[int], new: int, encoded: Tensor | None,
        at_once: bool,
    ) -> None:  # fmt: skip
        self.model, self.policy, self.decoder = model, policy, model.decoder
        self.device = next(model.parameters()).device
        self.cache = TokenCache(self.decoder, len(lengths), max(lengths) + new, at_once=at_once)
        self.lengths = lengths
        self.memory = None if encoded is None else self.decoder.memory(encoded)
        visited = range(model.exits) if policy is None else visits(policy, model.exits)
        ends = (*model.at, self.decoder.layers - 1)
        self.exit_behind = {} if policy is None else {ends[k]: k for k in visited if k < len(model.at)}

    def go(
        self, prompts: Sequence[Sequence[int]], most: list[int], end: int | None,
        pick: Callable[[list[int], Tensor], list[int]],
    ) -> Generated:  # fmt: skip
        """All new tokens: at most so many a row, picked from the rows' numbers and logits."""
        rows = list(range(len(prompts)))
        tokens: list[list[int]] = [[] for _ in rows]
        exits: list[list[int]] = [[] for _ in rows]
        logits, left = self._read(prompts), [self.model.exits - 1] * len(rows)
        while True:
            picked = pick(rows, logits)
            for row, token, exit_ in zip(rows, picked, left, strict=True):
                tokens[row].append(token)
                exits[row].append(exit_)
            rows = [row for row in rows if len(tokens[row]) < most[row] and tokens[row][-1] != end]
            if not rows:
                return Generated(tuple(map(tuple, tokens)), tuple(map(tuple, exits)))
            logits, left = self._step(rows, [tokens[row][-1] for row in rows])

    def _read(self, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "row token"]:
        """The logits behind every prompt, read by the whole decoder."""
        longest = max(self.lengths)
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=self.device)
        positions = torch.arange(longest, device=self.device).expand(len(prompts), longest)
        hidden, store = self.decoder.embed(ids, positions), self.cache.prompts(self.lengths)
        for j in range(self.decoder.layers):
            hidden = self.decoder.layer(j, hidden, positions, store, self.memory)
        last = torch.tensor(self.lengths, device=self.device) - 1
        return self.model.said(self.model.exits - 1, hidden[torch.arange(len(prompts), device=self.device), last])

    def _step(self, rows: list[int], tokens: list[int]) -> tuple[Tensor, list[int]]:
        """(logits, exits) of one new token for each of these rows, which then is in the cache."""
        positions = [self.lengths[row] for row in rows]
        for row in rows:
            self.lengths[row] += 1
        spots = torch.tensor(positions, device=self.device)[:, None]
        hidden = self.decoder.embed(torch.tensor(tokens, device=self.device)[:, None], spots)
        memory = self._memory_of(rows)
        flight, store = list(range(len(rows))), self.cache.step(rows, positions)
        answers: list[Tensor] = [hidden] * len(rows)
        left = [self.model.exits - 1] * len(rows)
        state: State | None = None
        for j in range(self.decoder.layers):
            hidden = self.decoder.layer(j, hidden, spots, store, memory)
            k = self.exit_behind.get(j)
            if k is None:
                continue
            stop, state, answer = self._asked(k, hidden[:, 0], state)
            if not any(stop):
                continue
            gone = [i for i, out in enumerate(stop) if out]
            here = [flight[i] for i in gone]
            self.cache.left([rows[i] for i in here], [positions[i] for i in here], hidden[gone, 0], j)
            for i, place in zip(gone, here, strict=True):
                answers[place], left[place] = answer[i], k
            stay = [i for i, out in enumerate(stop) if not out]
            flight = [flight[i] for i in stay]
            if not flight:
                return torch.stack(answers), left
            hidden, spots = hidden[stay], spots[stay]
            state = tuple(part[stay] for part in state)
            on = [rows[i] for i in flight]
            store, memory = self.cache.step(on, [positions[i] for i in flight]), self._memory_of(on)
        last = self.model.exits - 1
        said = self.model.said(last, hidden[:, 0]) if self.policy is None else self._asked(last, hidden[:, 0], state)[2]
        for i, place in enumerate(flight):
            answers[place] = said[i]
        return torch.stack(answers), left

    def _asked(self, k: int, hidden: Tensor, state: State | None) -> tuple[list[bool], State, Tensor]:
        """What the policy says at exit k: who leaves, its state, and the answers."""
        seen = Evidence(self.model.said(k, hidden))
        policy: Policy = self.policy  # type: ignore[assignment]
        step = policy.step(k, seen, policy.init(seen) if state is None else state)
        return step.stop.tolist(), step.state, step.answer

    def _memory_of(self, rows: list[int]) -> list[tuple[Tensor, Tensor]] | None:
        if self.memory is None or len(rows) == self.cache.rows:
            return self.memory
        return [(keys[rows], values[rows]) for keys, values in self.memory]
