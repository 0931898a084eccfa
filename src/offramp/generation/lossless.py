"""Drafts by an early exit, checked by the layers behind it in one pass: the whole decoder's own text, sooner."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.errors import ValueRangeError
from offramp.generation.given import Ends, checked_encoded, checked_prompts, ends_of, sound, until
from offramp.generation.heads import TokenExits
from offramp.generation.loop import Run, generate
from offramp.graph import eval_mode

__all__ = ["Draft", "DraftTimes", "Verified", "choose_draft", "generate_lossless"]


@dataclass(frozen=True)
class Draft:
    """How drafts are made.

    Args:
        exit: the exit whose tokens they are, 0-based, not the last.
        tokens: at most so many before they are checked.
        sure: a draft ends at a token to which the exit gives a smaller probability.
    """

    exit: int
    tokens: int = 4
    sure: float = 0.0

    def __post_init__(self) -> None:
        if self.exit < 0 or self.tokens < 1 or not 0 <= self.sure <= 1:
            raise ValueRangeError(f"{self}: expected an exit from 0, at least one token, and a probability in `sure`.")


USUAL = ((2, 0.0), (4, 0.0), (4, 0.5), (8, 0.5))  # tokens, sure


@dataclass(frozen=True)
class Verified:
    """What was generated, which is what the whole decoder generates.

    Args:
        tokens: the new tokens of every row.
        checks: passes through the layers behind the exit, by row.
        drafted, kept: tokens that were drafted, and those of them that the whole decoder says, too.
    """

    tokens: tuple[tuple[int, ...], ...]
    checks: tuple[int, ...]
    drafted: int
    kept: int


@dataclass(frozen=True)
class DraftTimes:
    """What `choose_draft` measured.

    Args:
        plain_s: seconds a new token without drafts, median over rounds.
        drafts: (draft, seconds a new token) of every draft that was tried, the fastest first.
    """

    plain_s: float
    drafts: tuple[tuple[Draft, float], ...]

    @property
    def best(self) -> Draft | None:
        """The fastest draft, None when it does not pay."""
        draft, seconds = self.drafts[0]
        return draft if seconds < self.plain_s else None

    @property
    def speedup(self) -> float:
        """Of the fastest draft, measured; below 1 when none pays."""
        return self.plain_s / self.drafts[0][1]


def generate_lossless(
    model: TokenExits,
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 32,
    end: Ends = None,
    encoded: Float[Tensor, "row memory dim"] | None = None,
) -> Verified:
    """The tokens that `generate(model, None, prompts)` gives, row after row, made of drafts that are checked.

    Layers up to the exit run once for every drafted token. The layers behind it run once for a whole draft, from the
    hidden states that it has left, and say what the decoder would have said at each place: drafted tokens are kept up
    to the first that differs, and the decoder's own token comes instead of that one. Products over several tokens add
    up in another order than over one, so a tie within rounding may fall differently.

    Source: self-speculative decoding as in LayerSkip (Elhoushi et al. 2024); ours ends a draft where the exit is
    unsure.

    Raises:
        ValueRangeError: as `generate`; or the draft is of no exit before the last.
    """
    lengths = checked_prompts(model, prompts, max_new_tokens)
    if draft.exit >= len(model.at):
        raise ValueRangeError(
            f"the draft is of exit {draft.exit}; expected one before the last, 0 to {len(model.at) - 1}."
        )
    rows, checks, drafted, kept = [], [], 0, 0
    ends, encoded = ends_of(end, model.classes), checked_encoded(model, encoded, len(lengths))
    with eval_mode(model), torch.inference_mode():
        for row, prompt in enumerate(prompts):
            memory = None if encoded is None else encoded[row : row + 1]
            text = _Text(model, draft, Run(model, None, [lengths[row]], max_new_tokens + draft.tokens, memory))
            rows.append(text.write(prompt, max_new_tokens, ends))
            checks.append(text.checks)
            drafted, kept = drafted + text.drafted, kept + text.kept
    return Verified(tuple(rows), tuple(checks), drafted, kept)


class _Text:
    """One row."""

    def __init__(self, model: TokenExits, draft: Draft, run: Run) -> None:
        self.model, self.draft, self.run, self.decoder = model, draft, run, model.decoder
        self.checks = self.drafted = self.kept = 0

    def write(self, prompt: Sequence[int], most: int, ends: frozenset[int]) -> tuple[int, ...]:
        """The new tokens."""
        tokens = [int(sound(self.run.read([prompt])).argmax())]
        while len(tokens) < most and tokens[-1] not in ends:
            begin = len(prompt) + len(tokens) - 1
            hidden, drafts = self._drafted(tokens[-1], begin, min(self.draft.tokens, most - len(tokens)), ends)
            said = self._checked(hidden, begin)
            right = 0
            while right < len(drafts) and drafts[right] == said[right]:
                right += 1
            tokens += until(said[: right + 1], ends)
            self.drafted, self.kept = self.drafted + len(drafts), self.kept + right
            self.run.cache.forget(begin + right + 1)
        return tuple(tokens)

    def _drafted(self, token: int, begin: int, most: int, ends: frozenset[int]) -> tuple[Tensor, list[int]]:
        """(hidden states behind the exit's layer of `token` and of drafts but the last, the drafts)."""
        k, cache = self.draft.exit, self.run.cache
        states: list[Tensor] = []
        drafts: list[int] = []
        while True:
            spots = torch.tensor([[begin + len(states)]], device=self.run.device)
            hidden = self.decoder.embed(torch.tensor([[token]], device=self.run.device), spots)
            store = cache.several(begin + len(states), 1)
            for j in range(self.model.at[k] + 1):
                hidden = self.decoder.layer(j, hidden, spots, store, self.run.memory)
            states.append(hidden)
            logits = self.model.said(k, hidden[:, 0])[0]
            token = int(logits.argmax())
            if self.draft.sure > 0 and float(logits[token] - logits.logsumexp(0)) < math.log(self.draft.sure):
                break
            drafts.append(token)
            if token in ends or len(drafts) == most:
                break
        return torch.cat(states, dim=1), drafts

    def _checked(self, hidden: Tensor, begin: int) -> list[int]:
        """What the whole decoder says behind each of these states."""
        count = hidden.shape[1]
        spots = torch.arange(begin, begin + count, device=hidden.device)[None]
        store = self.run.cache.several(begin, count)
        for j in range(self.model.at[self.draft.exit] + 1, self.decoder.layers):
            hidden = self.decoder.layer(j, hidden, spots, store, self.run.memory)
        self.checks += 1
        return self.model.said(self.model.exits - 1, hidden[0]).argmax(-1).tolist()  # type: ignore[no-any-return]


def choose_draft(
    model: TokenExits,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 32,
    end: Ends = None,
    encoded: Float[Tensor, "row memory dim"] | None = None,
    drafts: Iterable[Draft] | None = None,
    rounds: int = 3,
) -> DraftTimes:
    """Which draft is fastest here, measured in alternating rounds with the whole decoder, one prompt after the other.

    Args:
        model, prompts, max_new_tokens, end, encoded: as for `generate_lossless`.
        drafts: those that are tried; 2 to 8 tokens of about four exits unless given. Each is timed once, and the
            best three in every round.
        rounds: of which medians are taken.

    Raises:
        ValueRangeError: as `generate_lossless`; or there is no draft.
    """
    behind = range(len(model.at))[:: max(1, len(model.at) // 4)]
    tried = list(drafts) if drafts is not None else [Draft(k, n, sure) for k in behind for n, sure in USUAL]
    if not tried:
        raise ValueRangeError("there is no draft to try; give one, or a model with an exit before its last layer.")
    if rounds < 1:
        raise ValueRangeError(f"rounds is {rounds}; expected at least 1.")
    checked_encoded(model, encoded, len(checked_prompts(model, prompts, max_new_tokens)))

    def plain() -> int:
        texts = [
            generate(model, None, [prompt], max_new_tokens=max_new_tokens, end=end, encoded=memory).tokens
            for prompt, memory in given
        ]
        return sum(len(text[0]) for text in texts)

    def with_drafts(draft: Draft) -> Callable[[], int]:
        def write() -> int:
            texts = [
                generate_lossless(model, draft, [prompt], max_new_tokens=max_new_tokens, end=end, encoded=memory).tokens
                for prompt, memory in given
            ]
            return sum(len(text[0]) for text in texts)

        return write

    given = [(row, None if encoded is None else encoded[i : i + 1]) for i, row in enumerate(prompts)]
    plain()
    first = {draft: _seconds(with_drafts(draft)) for draft in tried}
    best = sorted(tried, key=first.__getitem__)[:3]
    plains: list[float] = []
    found: dict[Draft, list[float]] = {draft: [] for draft in best}
    for _ in range(rounds):
        plains.append(_seconds(plain))
        for draft in best:
            found[draft].append(_seconds(with_drafts(draft)))
    medians = {**first, **{draft: statistics.median(each) for draft, each in found.items()}}
    order = sorted(best, key=medians.__getitem__) + sorted(set(tried) - set(best), key=lambda each: first[each])
    return DraftTimes(statistics.median(plains), tuple((draft, medians[draft]) for draft in order))


def _seconds(write: Callable[[], int]) -> float:
    """Seconds a new token."""
    began = time.perf_counter()
    tokens = write()
    return (time.perf_counter() - began) / tokens
