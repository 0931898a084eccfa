"""What texts lose that leave early, bounded over whole texts: the boldest of some policies that is certified."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.calibrate import Promise
from offramp.calibrate.bounds import betting_p, upper_bound
from offramp.errors import DataError, ShapeError, ValueRangeError
from offramp.generation.given import Ends
from offramp.generation.heads import TokenExits
from offramp.generation.loop import Generated, generate
from offramp.generation.rules import TokenPolicy
from offramp.meter import Meter
from offramp.policies import Policy

__all__ = ["Changed", "TextLoss", "TextResult", "Tried", "certify_texts", "in_batches"]

Tokens = Sequence[Sequence[int]]


@runtime_checkable
class TextLoss(Protocol):
    """What a text lost, text by text.

    A loss has `name`, the `epsilon` that its mean is to stay below, and the `least` that it can be; it is at most 1.
    """

    name: str
    epsilon: float
    least: float

    def __call__(self, whole: Tokens, early: Tokens) -> Float[Tensor, "row"]:
        """The losses of texts [row], given the whole decoder's and those with exits."""
        ...


@dataclass(frozen=True)
class Changed:
    """1 where a text is not, token for token, what the whole decoder says.

    Args:
        epsilon: at most such a share of texts may change.
    """

    epsilon: float
    name: str = field(default="changed", init=False)
    least: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.epsilon, float | int) or not 0 < self.epsilon < 1:
            raise ValueRangeError(f"epsilon is {self.epsilon!r}; expected a share of texts between 0 and 1.")

    def __call__(self, whole: Tokens, early: Tokens) -> Tensor:
        """0 or 1 for every text."""
        return torch.tensor([float(list(a) != list(b)) for a, b in zip(whole, early, strict=True)])


@dataclass(frozen=True)
class Tried:
    """What one policy did on the texts.

    Args:
        loss: the mean.
        p: the p-value of "the mean loss on new texts is above epsilon".
        depth: mean exit of its tokens, 0-based.
    """

    policy: TokenPolicy
    loss: float
    p: float
    depth: float


@dataclass(frozen=True)
class TextResult:
    """What came of `certify_texts`.

    Args:
        policy: the boldest policy that is certified; None where none is, and no text should leave early.
        promise: what is promised of it and on how many texts that rests; None without a policy.
        tried: what was tried, from the safest on; the last may be the one that ended the test.
    """

    policy: TokenPolicy | None
    promise: Promise | None
    tried: tuple[Tried, ...]


def certify_texts(
    model: TokenExits,
    rungs: Sequence[Policy | TokenPolicy],
    prompts: Tokens,
    loss: TextLoss,
    *,
    delta: float = 0.05,
    max_new_tokens: int = 32,
    end: Ends = None,
    encoded: Float[Tensor, "row memory dim"] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> TextResult:
    """The boldest of some policies whose mean loss over new texts is at most the loss's epsilon, with confidence.

    Every policy generates the texts as in use, so that what an early exit does to later tokens counts. The first that
    is not certified, from the safest on, ends it: the chance of a wrong certificate is at most delta (Learn then Test,
    fixed sequence), by the betting bound of Waudby-Smith and Ramdas over whole texts, not their tokens.

    Args:
        model: from `attach_tokens`.
        rungs: from the safest to the boldest, chosen without these texts.
        prompts, max_new_tokens, end, encoded: as for `generate`; texts that neither training nor the rungs have seen.
        loss: of a text, such as `Changed(0.05)` or `MetricDrop`.
        delta: the chance that the promise does not hold.
        batch_size: texts generated at once.
        seed: of the order of texts in the test.

    Raises:
        DataError, ValueRangeError: there are no policies; delta is no chance.
        ShapeError: the loss gave something other than one number a text.
    """
    if not rungs or not len(prompts):
        raise DataError("there are no policies to try, or no prompts; give one or more of each, safest policies first.")
    if not 0 < delta < 1:
        raise ValueRangeError(f"delta is {delta!r}; expected a number between 0 and 1.")
    rules = [each if isinstance(each, TokenPolicy) else TokenPolicy(each) for each in rungs]

    written = partial(
        in_batches, model, prompts=prompts, max_new_tokens=max_new_tokens, end=end, encoded=encoded,
        batch_size=batch_size,
    )  # fmt: skip
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    tried, best, found = list[Tried](), None, None
    with Meter("certifying", len(rules) + 1, progress) as meter:
        whole = written(policy=None)
        meter.advance()
        for rule in rules:
            one, losses = _tried(rule, whole, written(policy=rule), loss, delta, order)
            tried.append(one)
            meter.advance()
            if one.p > delta:
                break
            best, found = rule, losses
    if best is None or found is None:
        return TextResult(None, None, tuple(tried))
    bound = upper_bound(found[order], "betting", delta, least=loss.least)
    promise = Promise(loss.name, "betting", loss.epsilon, delta, float(found.mean()), len(prompts), bound)
    return TextResult(best, promise, tuple(tried))


def _tried(
    rule: TokenPolicy, whole: Generated, early: Generated, loss: TextLoss, delta: float, order: Tensor
) -> tuple[Tried, Tensor]:
    """(what a policy did, its losses)."""
    losses = _checked(loss(whole.tokens, early.tokens), len(order))
    p = float(betting_p(losses[order], loss.epsilon, delta, least=loss.least))
    exits = [exit_ for row in early.exits for exit_ in row]
    return Tried(rule, float(losses.mean()), p, sum(exits) / max(1, len(exits))), losses


def _checked(losses: Tensor, rows: int) -> Tensor:
    if losses.shape != (rows,) or not bool(losses.isfinite().all()):
        raise ShapeError(f"the loss gave shape {list(losses.shape)}; expected [{rows}], a finite number for each text.")
    return losses.double()


def in_batches(
    model: TokenExits, *, policy: Policy | TokenPolicy | None, prompts: Tokens, batch_size: int = 16,
    encoded: Tensor | None = None, **options: Any,
) -> Generated:  # fmt: skip
    """`generate`, so many prompts at once."""
    tokens: list[tuple[int, ...]] = []
    exits: list[tuple[int, ...]] = []
    for begin in range(0, len(prompts), batch_size):
        part = slice(begin, begin + batch_size)
        memory = None if encoded is None else encoded[part]
        said = generate(model, policy, prompts[part], encoded=memory, **options)
        tokens += said.tokens
        exits += said.exits
    return Generated(tuple(tokens), tuple(exits))
