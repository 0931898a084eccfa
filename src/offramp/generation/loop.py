"""Generation in which every token leaves at an exit of its own, and rows that go on go on alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.errors import ValueRangeError
from offramp.generation.cache import TokenCache
from offramp.generation.choosing import Sampling, likeliest
from offramp.generation.given import Ends, checked_encoded, checked_prompts, ends_of, sound
from offramp.generation.heads import TokenExits
from offramp.generation.memory import Memory
from offramp.generation.picking import pick, picked
from offramp.generation.rules import TokenPolicy, as_rule
from offramp.graph import eval_mode
from offramp.policies.base import Evidence, Policy, State

__all__ = ["Generated", "Run", "Scored", "generate", "score"]


@dataclass(frozen=True, eq=False)
class Generated:
    """What was generated.

    Args:
        tokens: the new tokens of every row, its end token included where it came.
        exits: the exit that each of them left at, 0-based.
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
    policy: Policy | TokenPolicy | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 32,
    end: Ends = None,
    encoded: Float[Tensor, "row memory dim"] | None = None,
    choose: Callable[[Tensor], Tensor] | Sampling | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    stream: Callable[[int, int, int], None] | None = None,
    at_once: bool = False,
) -> Generated:
    """New tokens for every prompt, each token leaving at the first exit at which the policy says so.

    Several threads may share a model that is in evaluation mode.

    Args:
        model: from `attach_tokens`.
        policy: made for as many exits, or a `TokenPolicy`; None runs every layer and no head but the last.
        prompts: token numbers, a row each; lengths may differ.
        max_new_tokens: at most so many in each row.
        end: the token after which a row is done, or several.
        encoded: what an encoder gave, for decoders that look at it.
        choose: how tokens are drawn, or a function from logits [row token] to tokens [row]; the likeliest unless given.
        stop: from a row's new tokens to whether it is done, such as `stop_at(tokenizer, strings)`.
        stream: told every new token when it is there: its row, its number, and its exit.
        at_once: fill the keys and values of skipped layers when a token leaves and not when they are next needed.

    Raises:
        ValueRangeError: a prompt is empty or too long for the decoder, or has a number that is no token.
        ShapeError: the policy is for another number of exits; prompts or states are of another shape.
        DataError: the model says NaN.
    """
    lengths, ends = checked_prompts(model, prompts, max_new_tokens), ends_of(end, model.classes)
    encoded = checked_encoded(model, encoded, len(lengths))
    rule = as_rule(policy, model.exits, gates=model.gates is not None)
    device = next(model.parameters()).device
    chosen = choose.chooser(device) if isinstance(choose, Sampling) else choose or likeliest
    if not callable(chosen):
        raise ValueRangeError(f"choose is {choose!r}; expected Sampling(...), or a function from logits to tokens.")
    with eval_mode(model), torch.inference_mode():
        run = Run(model, rule, lengths, max_new_tokens, encoded, at_once=at_once)
        return run.go(
            prompts, [max_new_tokens] * len(lengths), lambda _, logits: chosen(logits).tolist(),
            lambda tokens: tokens[-1] in ends or (stop is not None and stop(tokens)), stream,
        )  # fmt: skip


def score(
    model: TokenExits,
    policy: Policy | TokenPolicy | None,
    rows: Sequence[Sequence[int]],
    *,
    encoded: Float[Tensor, "row memory dim"] | None = None,
    given: int = 1,
    max_new_tokens: int | None = None,
) -> Scored:
    """How likely the tokens of given rows are, each said behind those before it as the exits have left them.

    Args:
        model, policy, encoded: as for `generate`.
        rows: token numbers, a row each, of more than `given` tokens.
        given: so many at the beginning are read and not scored.
        max_new_tokens: over so many tokens thresholds fall that decay; those of the longest row unless given.

    Raises:
        ValueRangeError, ShapeError: as `generate`; or a row has nothing to score.
    """
    if any(len(row) <= given for row in rows) or given < 1:
        raise ValueRangeError(f"every row needs more than given={given} tokens, which has to be at least 1.")
    prompts, rest = [row[:given] for row in rows], [list(row[given:]) for row in rows]
    longest = max(map(len, rest), default=0)
    lengths = checked_prompts(model, prompts, longest)
    most = longest if max_new_tokens is None else max_new_tokens
    if most < longest:
        raise ValueRangeError(f"max_new_tokens is {most}; a row has {longest} tokens to score. Give at least as many.")
    encoded = checked_encoded(model, encoded, len(lengths))
    checked_prompts(model, rest, 1)
    rule = as_rule(policy, model.exits, gates=model.gates is not None)
    losses: list[list[float]] = [[] for _ in rows]

    def said(going: list[int], logits: Tensor) -> list[int]:
        tokens = [rest[row][len(losses[row])] for row in going]
        found = -logits.float().log_softmax(-1)[torch.arange(len(going)), torch.tensor(tokens)]
        for row, loss in zip(going, found.tolist(), strict=True):
            losses[row].append(loss)
        return tokens

    with eval_mode(model), torch.inference_mode():
        run = Run(model, rule, lengths, most, encoded)
        exits = run.go(prompts, [len(row) for row in rest], said).exits
    return Scored(tuple(map(tuple, losses)), exits)


class Run:
    """One text a row: its cache, and the steps that make a token for each of some rows.

    Args:
        model, encoded, at_once: as for `generate`.
        rule: how tokens leave; None for not at all.
        lengths: of the prompts.
        new: tokens that are to be made at most.
    """

    def __init__(
        self, model: TokenExits, rule: TokenPolicy | None, lengths: list[int], new: int, encoded: Tensor | None = None,
        *, at_once: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.decoder, self.new = model, model.decoder, new
        self.device = next(model.parameters()).device
        self.cache = TokenCache(self.decoder, len(lengths), max(lengths) + new, at_once=at_once)
        self.lengths, self.made = [0] * len(lengths), 0  # tokens in the cache, new tokens
        self.memory = None if encoded is None else self.decoder.memory(encoded)
        self.leave_by(rule)
        self.policy: Policy | None = None  # of the step that is under way
        self.read_by = self.decoder.layers  # so many layers have read the prompts

    def leave_by(self, rule: TokenPolicy | None) -> None:
        """Nothing; tokens leave by this rule from now on."""
        visited = () if rule is None else rule.visited(self.model.exits)
        ends = (*self.model.at, self.decoder.layers - 1)
        self.rule, self.exit_behind = rule, {ends[k]: k for k in visited if k < len(self.model.at)}

    def go(
        self, prompts: Sequence[Sequence[int]], most: list[int], pick: Callable[[list[int], Tensor], list[int]],
        over: Callable[[list[int]], bool] | None = None, stream: Callable[[int, int, int], None] | None = None,
    ) -> Generated:  # fmt: skip
        """All new tokens: at most so many a row, picked from the rows' numbers and logits, until a row is over."""
        rows = list(range(len(prompts)))
        tokens: list[list[int]] = [[] for _ in rows]
        exits: list[list[int]] = [[] for _ in rows]
        logits, left = self.begin(prompts)
        while True:
            for row, token, exit_ in zip(rows, pick(rows, logits), left, strict=True):
                tokens[row].append(token)
                exits[row].append(exit_)
                if stream is not None:
                    stream(row, token, exit_)
            rows = [r for r in rows if len(tokens[r]) < most[r] and not (over is not None and over(tokens[r]))]
            if not rows:
                return Generated(tuple(map(tuple, tokens)), tuple(map(tuple, exits)))
            logits, left = self.step(rows, [tokens[row][-1] for row in rows])

    def begin(self, prompts: Sequence[Sequence[int]]) -> tuple[Float[Tensor, "row token"], list[int]]:
        """(logits, exits) of the first new token. A layer reads the prompts, but their last tokens, when a new token
        first comes to it; without exits the whole decoder reads them in one pass."""
        if self.rule is None:
            return sound(self.read(prompts)), [self.model.exits - 1] * len(prompts)
        if any(len(prompt) > 1 for prompt in prompts):
            self._given([prompt[:-1] for prompt in prompts])
            if self.cache.at_once:
                self._read_until(self.decoder.layers)
        logits, left = self.step(list(range(len(prompts))), [prompt[-1] for prompt in prompts])
        return sound(logits), left

    def read(self, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "row token"]:
        """The logits behind every prompt, read by the whole decoder."""
        self._given(prompts)
        self._read_until(self.decoder.layers)
        last = torch.tensor(self.lengths, device=self.device) - 1
        behind = self.prompts[torch.arange(len(prompts), device=self.device), last]
        return self.model.said(self.model.exits - 1, behind)

    def _given(self, prompts: Sequence[Sequence[int]]) -> None:
        """Nothing; the prompts are there, and no layer has read them."""
        self.lengths = [len(prompt) for prompt in prompts]
        self.given = list(self.lengths)
        longest = max(self.lengths)
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=self.device)
        positions = torch.arange(longest, device=self.device).expand(len(prompts), longest)
        self.prompts: Float[Tensor, "row given dim"] = self.decoder.embed(ids, positions)
        self.read_by = 0

    def _read_until(self, layers: int) -> None:
        """Nothing; so many layers have read the prompts, and padding behind them is not in the cache."""
        if self.read_by >= layers:
            return
        positions = torch.arange(self.prompts.shape[1], device=self.device).expand(self.prompts.shape[:2])
        store = self.cache.prompts(self.given)
        for j in range(self.read_by, layers):
            self.prompts = self.decoder.layer(j, self.prompts, positions, store, self.memory)
        self.read_by = layers

    def step(self, rows: list[int], tokens: list[int]) -> tuple[Tensor, list[int]]:
        """(logits, exits) of the token behind these, which are put into the cache: one for each of these rows."""
        self.policy = None if self.rule is None else self.rule.at(self.made, self.new)
        self.made += 1
        positions = [self.lengths[row] for row in rows]
        for row in rows:
            self.lengths[row] += 1
        spots = torch.tensor(positions, device=self.device)[:, None]
        hidden = self.decoder.embed(torch.tensor(tokens, device=self.device)[:, None], spots)
        memory = self._memory_of(rows)
        flight, store = list(range(len(rows))), self.cache.step(rows, positions)
        said: list[tuple[list[int], Tensor]] = []  # the places of rows that left together, and their answers
        left = [self.model.exits - 1] * len(rows)
        state: State | None = None
        for j in range(self.decoder.layers):
            self._read_until(j + 1)
            hidden = self.decoder.layer(j, hidden, spots, store, memory)
            k = self.exit_behind.get(j)
            if k is None:
                continue
            stop, state, answer = self._asked(k, hidden[:, 0], state)
            if not any(stop):
                continue
            here = [place for place, out in zip(flight, stop, strict=True) if out]
            for place in here:
                left[place] = k
            gone = picked([i for i, out in enumerate(stop) if out], len(stop), self.device)
            self.cache.left([rows[i] for i in here], [positions[i] for i in here], pick(hidden, gone)[:, 0], j)
            said.append((here, pick(answer, gone)))
            if len(here) == len(flight):
                return _together(said), left
            stay = picked([i for i, out in enumerate(stop) if not out], len(stop), self.device)
            flight = [place for place, out in zip(flight, stop, strict=True) if not out]
            hidden, spots = pick(hidden, stay), pick(spots, stay)
            state = None if state is None else tuple(pick(part, stay) for part in state)
            on = [rows[i] for i in flight]
            store, memory = self.cache.step(on, [positions[i] for i in flight]), self._memory_of(on)
        last, behind = self.model.exits - 1, hidden[:, 0]
        said.append(
            (flight, self.model.said(last, behind) if self.policy is None else self._asked(last, behind, state)[2])
        )
        return _together(said), left

    def reorder(self, rows: list[int]) -> None:
        """Row i goes on with what row rows[i] was."""
        self.cache.reorder(rows)
        self.lengths = [self.lengths[row] for row in rows]
        if self.read_by < self.decoder.layers:
            self.given, self.prompts = [self.given[row] for row in rows], self.prompts[list(rows)]
        if self.memory is not None:
            self.memory = self.memory.of(rows)

    def _asked(self, k: int, hidden: Tensor, state: State | None) -> tuple[list[bool], State | None, Tensor]:
        """What the policy says at exit k: who leaves, its state, and the answers; rows that a gate holds stay."""
        policy: Policy = self.policy  # type: ignore[assignment]
        open_ = self.model.opened(k, hidden, self.rule)
        if open_ is not None and not all(open_):
            if not any(open_):
                return open_, state, hidden
            return self._asked_some(k, hidden, state, [i for i, asked in enumerate(open_) if asked])
        seen = Evidence(self.model.said(k, hidden))
        step = policy.step(k, seen, policy.init(seen) if state is None else state)
        return step.stop.tolist(), step.state, step.answer

    def _asked_some(
        self, k: int, hidden: Tensor, state: State | None, asked: list[int]
    ) -> tuple[list[bool], State, Tensor]:
        policy: Policy = self.policy  # type: ignore[assignment]
        seen = Evidence(self.model.said(k, hidden[asked]))
        answer = seen.logits.new_zeros(len(hidden), seen.logits.shape[1])
        state = policy.init(Evidence(answer)) if state is None else state
        step = policy.step(k, seen, tuple(part[asked] for part in state))
        state = tuple(part.clone() for part in state)
        for part, changed in zip(state, step.state, strict=True):
            part[asked] = changed
        answer[asked] = step.answer
        stop = [False] * len(hidden)
        for i, out in zip(asked, step.stop.tolist(), strict=True):
            stop[i] = out
        return stop, state, answer

    def _memory_of(self, rows: list[int]) -> Memory | None:
        return self.memory if self.memory is None or len(rows) == self.cache.rows else self.memory.of(rows)


def _together(said: list[tuple[list[int], Tensor]]) -> Float[Tensor, "row token"]:
    """The answers of all rows, in the rows' order."""
    if len(said) == 1:
        return said[0][1]
    places = [place for part, _ in said for place in part]
    return torch.cat([answer for _, answer in said])[sorted(range(len(places)), key=places.__getitem__)]
