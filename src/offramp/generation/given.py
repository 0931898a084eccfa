"""What is given to generate from, looked at before anything runs."""

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from offramp.errors import DataError, ShapeError, ValueRangeError
from offramp.generation.heads import TokenExits

__all__ = ["Ends", "checked_encoded", "checked_prompts", "ends_of", "sound", "until"]

Ends = int | Sequence[int] | None


def checked_prompts(model: TokenExits, prompts: Sequence[Sequence[int]], new: int) -> list[int]:
    """The lengths of the prompts.

    Raises:
        ShapeError: they are no rows of token numbers.
        ValueRangeError: they cannot be read, or there is no room for so many new tokens.
    """
    context, vocabulary = model.decoder.context, model.classes
    try:
        rows = [[operator.index(token) for token in prompt] for prompt in prompts]
    except TypeError:
        raise ShapeError(
            f"prompts are {_short(prompts)}; expected a list of token numbers for each text, which a tokenizer makes: "
            "[[5, 12], [7]]."
        ) from None
    lengths = list(map(len, rows))
    if not lengths or min(lengths) == 0:
        raise ValueRangeError(
            f"there are {len(lengths)} prompts, the shortest of 0 tokens; expected at least one each."
        )
    if not isinstance(new, int) or new < 1:
        raise ValueRangeError(f"max_new_tokens is {new!r}; expected at least 1, a whole number.")
    if max(lengths) + new > context:
        raise ValueRangeError(
            f"a prompt of {max(lengths)} tokens and {new} new ones make {max(lengths) + new}; the decoder has room for "
            f"{context}. Shorten the prompt, or ask for fewer."
        )
    if not all(0 <= token < vocabulary for row in rows for token in row):
        raise ValueRangeError(f"a prompt has a token that is not in 0 to {vocabulary - 1}: the vocabulary's size.")
    return lengths


def checked_encoded(model: TokenExits, encoded: Tensor | None, rows: int) -> Tensor | None:
    """What an encoder gave, where the decoder is and in its precision.

    Raises:
        ShapeError: it is not for so many rows, or not as wide as the decoder.
        ValueRangeError: the model looks at images, and nothing was given.
    """
    if encoded is None:
        if hasattr(model.backbone, "encoder"):
            raise ValueRangeError("the model looks at images; give encoded=model.encode(pixels), a row for each text.")
        return None
    shape = list(encoded.shape) if isinstance(encoded, Tensor) else None
    if shape is None or len(shape) != 3 or (shape[0], shape[2]) != (rows, model.decoder.width):
        raise ShapeError(
            f"encoded is {shape or type(encoded).__name__}; expected [{rows} memory {model.decoder.width}], for each "
            "text what model.encode gives for its image."
        )
    return encoded.to(next(model.decoder.network.parameters()))


def ends_of(end: Ends, vocabulary: int) -> frozenset[int]:
    """The tokens after which a row is done.

    Raises:
        ValueRangeError: one of them is no token.
    """
    try:
        found = frozenset(map(operator.index, () if end is None else end if isinstance(end, Sequence) else (end,)))
    except TypeError:
        found = frozenset((-1,))
    if not all(0 <= token < vocabulary for token in found):
        raise ValueRangeError(
            f"end is {end!r}; expected the number of a token, or of several, from 0 to {vocabulary - 1}."
        )
    return found


def until(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """The tokens up to the first that ends a row."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in ends), tokens)


def sound(logits: Tensor) -> Tensor:
    """The logits themselves.

    Raises:
        DataError: some are NaN.
    """
    if bool(logits.isnan().any()):
        raise DataError("the model says NaN of the first token: its weights are damaged, or too large for its dtype.")
    return logits


def _short(value: Any) -> str:
    told = f"{type(value).__name__} {value!r}"
    return told if len(told) < 80 else f"{told[:77]}..."
