"""Texts to token ids, by the tokenizers library alone: what a bundle needs to run without transformers."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from offramp.artefacts import write_atomically
from offramp.data import Examples
from offramp.errors import DataError, FormatError, MissingExtra, ValueRangeError
from offramp.preprocess.base import Row, check_names, write_fields

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TOKENIZER", "TextPreprocess"]

TOKENIZER = "tokenizer.json"
ATTRIBUTES = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
MOST_TOKENS = 1_000_000


@dataclass(frozen=True, eq=False)
class TextPreprocess:
    """One text, or two, as the token tensors int64 [batch tok] that a transformer takes.

    Args:
        columns: one column of texts, or two.
        max_length: in tokens; longer texts are cut, the longer one of two first.
        names: keywords of the model, of input_ids, attention_mask and token_type_ids.
        pad_id: what fills short rows of input_ids; the mask is 0 there.
        tokenizer_json: what the tokenizers library reads.

    Raises:
        ValueRangeError: a value is out of its range.
        FormatError: the tokenizer cannot be read.
    """

    kind: ClassVar[str] = "text"

    columns: tuple[str, ...]
    max_length: int
    names: tuple[str, ...]
    pad_id: int
    tokenizer_json: str = field(repr=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "columns", check_names(self.columns, "columns", 2))
        put(self, "names", check_names(self.names, "names", 3))
        if not set(self.names) <= set(ATTRIBUTES) or "input_ids" not in self.names:
            raise ValueRangeError(f"names are {self.names}; expected input_ids and some of {', '.join(ATTRIBUTES)}.")
        if type(self.max_length) is not int or not 2 <= self.max_length <= MOST_TOKENS:
            raise ValueRangeError(f"max_length is {self.max_length!r}; expected 2 tokens or more.")
        if type(self.pad_id) is not int or not 0 <= self.pad_id < 2**31:
            raise ValueRangeError(f"pad_id is {self.pad_id!r}; expected a token's number.")
        put(self, "_lock", threading.Lock())
        if self._tokenizer.num_special_tokens_to_add(len(self.columns) == 2) >= self.max_length:
            raise ValueRangeError(f"max_length={self.max_length} leaves no room beside the special tokens.")

    @classmethod
    def of(
        cls, tokenizer: Any, columns: Sequence[str], max_length: int, names: Sequence[str] | None = None
    ) -> "TextPreprocess":
        """The preprocessing of a transformers tokenizer.

        Args:
            names: which of its outputs the model takes; its own `model_input_names` unless given.

        Raises:
            ValueRangeError: it is not one of the fast tokenizers, which a file describes whole, or pads on the left.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueRangeError(
                f"{type(tokenizer).__name__} is a tokenizer in Python code; expected one with a tokenizer.json. "
                "Convert it with transformers' convert_slow_tokenizer."
            )
        if getattr(tokenizer, "padding_side", "right") != "right":
            raise ValueRangeError("the tokenizer pads on the left; expected padding_side='right'.")
        wanted = tokenizer.model_input_names if names is None else names
        limit = min(max_length, getattr(tokenizer, "model_max_length", max_length) or max_length)
        return cls(
            tuple(columns),
            int(limit),
            tuple(name for name in ATTRIBUTES if name in wanted),
            int(tokenizer.pad_token_id or 0),
            backend.to_str(),
        )

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise MissingExtra("texts need the tokenizers package: pip install 'offramp[text]'.") from None
        try:
            made = Tokenizer.from_str(self.tokenizer_json)
            made.no_padding()
            made.no_truncation()
            made.encode("a word", "another" if len(self.columns) == 2 else None)
        except BaseException as error:  # a panic of the Rust library is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            told = (str(error).splitlines() or ["no reason"])[0][:200]
            raise FormatError(f"{TOKENIZER} is not what the tokenizers library reads: {told}.") from None
        return made

    def check(self, row: Row) -> str | None:
        """Why a row cannot be used, or None when it can."""
        for name in self.columns:
            value = row.get(name)
            if value is None:
                return f"it has no {name!r}"
            if not isinstance(value, str):
                return f"its {name!r} is {type(value).__name__}; expected a text"
            if not value.strip():
                return f"its {name!r} is empty"
        return None

    def truncated(self, rows: Sequence[Row]) -> list[int]:
        """The places of the rows whose texts are longer than `max_length` tokens."""
        return [place for place, ids in enumerate(self._encode(rows, self.max_length)) if ids.overflowing]

    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Token tensors int64 [batch tok], as long as the longest row.

        Raises:
            DataError: a row has no such text.
        """
        encoded = self._encode(rows, self.max_length)
        longest = max(2, *(len(one.ids) for one in encoded)) if encoded else 2
        made = {}
        for name in self.names:
            fill = self.pad_id if name == "input_ids" else 0
            lists = [getattr(one, ATTRIBUTES[name]) for one in encoded]
            made[name] = torch.tensor([ids + [fill] * (longest - len(ids)) for ids in lists], dtype=torch.int64)
        return made

    def examples(self, rows: Sequence[Row], labels: Tensor | None = None, ids: Tensor | None = None) -> Examples:
        """The rows as `Examples`, of their own lengths, for training in buckets."""
        encoded = self._encode(rows, self.max_length)
        columns = {name: [getattr(one, ATTRIBUTES[name]) for one in encoded] for name in self.names}
        return Examples(
            columns, labels, pad_id=self.pad_id, ids=ids, truncated=sum(bool(e.overflowing) for e in encoded)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Nothing; preprocess.json and tokenizer.json are in the folder."""
        text = self.tokenizer_json

        def write(path: Path) -> None:
            path.write_text(text, encoding="utf-8")

        write_atomically(folder / TOKENIZER, write)
        fields = {
            "columns": list(self.columns),
            "max_length": self.max_length,
            "names": list(self.names),
            "pad_id": self.pad_id,
        }
        write_fields(folder, self.kind, fields)

    def _encode(self, rows: Sequence[Row], length: int) -> list[Any]:
        for place, row in enumerate(rows):
            if not all(isinstance(row.get(name), str) for name in self.columns):
                raise DataError(f"row {place} cannot be used: {self.check(row)}.")
        texts = [tuple(row[name] for name in self.columns) for row in rows]
        with self._lock:  # type: ignore[attr-defined]  # the tokenizer's truncation is a state of its own
            self._tokenizer.enable_truncation(length)
            return self._tokenizer.encode_batch([text if len(text) > 1 else text[0] for text in texts])
