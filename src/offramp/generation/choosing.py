"""Which token is taken, and when a text is over."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from offramp.errors import ValueRangeError

__all__ = ["Sampling", "likeliest", "stop_at"]


def likeliest(logits: Float[Tensor, "row token"]) -> Int64[Tensor, "row"]:
    """The likeliest token of every row."""
    return logits.argmax(-1)


@dataclass(frozen=True)
class Sampling:
    """Tokens drawn by their probabilities, as transformers draws them.

    Args:
        temperature: logits are divided by it.
        top_k: only so many of the likeliest tokens are drawn from.
        top_p: only the likeliest tokens that have this probability together.
        seed: of the draws, begun anew by every call. What a row gets depends on the rows beside it, and on when they
            end: rows that are done draw no more, unlike in transformers.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueRangeError(f"temperature is {self.temperature!r}; expected above 0. For 0, sample nothing.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueRangeError(f"top_k is {self.top_k!r}; expected at least 1.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueRangeError(f"top_p is {self.top_p!r}; expected above 0 and at most 1.")

    def chooser(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """From logits [row token] to tokens [row]; the draws begin anew with every chooser."""
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        warpers: list[Any] = [TemperatureLogitsWarper(float(self.temperature))]
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        generator = torch.Generator(device).manual_seed(self.seed)

        def choose(logits: Tensor) -> Tensor:
            logits = logits.float()  # as transformers does
            for warper in warpers:
                logits = warper(None, logits)
            return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

        return choose


def stop_at(tokenizer: Any, strings: Sequence[str]) -> Callable[[list[int]], bool]:
    """Whether the text of new tokens has one of the strings in it: for `stop` of `generate`.

    Raises:
        ValueRangeError: there is no string, or an empty one.
    """
    wanted = (strings,) if isinstance(strings, str) else tuple(strings)
    if not wanted or not all(isinstance(each, str) and each for each in wanted):
        raise ValueRangeError(f"stop strings are {strings!r}; expected one or more that are not empty.")

    def over(tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens)
        return any(each in text for each in wanted)

    return over
