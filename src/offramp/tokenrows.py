"""Sequences of tokens to learn from, with an image for each where there is one."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int, Int64, Shaped
from torch import Generator, Tensor

from offramp.data import Augment, Batch, Ragged
from offramp.errors import DataError, ShapeError

__all__ = ["TokenRows", "next_tokens"]

NO_TOKEN = -100  # where a label stands for nothing, as in transformers


class TokenRows:
    """Rows of tokens, each to be said after those before it.

    Args:
        ids: token numbers, a row each, of two tokens or more: the first is given, the others are to be said.
        pad: what fills up the shorter rows of a batch; nothing learns from it.
        images: uint8 [image 3 height width], or None.
        image: for every row the number of its image; row i has image i unless given.
        prepare: from a batch of images to what the encoder takes.
        encoded: float [image memory dim] instead of images: what a frozen encoder gave, computed once.

    Raises:
        DataError: there are no rows, or one is too short.
        ShapeError: images and rows do not go together.
    """

    labels = None  # each token is one

    def __init__(
        self, ids: Sequence[Sequence[int]], *, pad: int = 0,
        images: Shaped[Tensor, "image 3 height width"] | None = None, image: Int[Tensor, "row"] | None = None,
        prepare: Callable[[Tensor], Tensor] | None = None, encoded: Float[Tensor, "image memory dim"] | None = None,
    ) -> None:  # fmt: skip
        if not len(ids):
            raise DataError("there are no sequences. Give at least one.")
        try:
            self.ids = Ragged.of(ids)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(
                "sequences are not all of token numbers; expected a list of them for each text, from a tokenizer."
            ) from None
        self.pad, self.images, self.prepare = pad, images, prepare
        self.encoded = encoded
        if images is not None and encoded is not None:
            raise ShapeError("there are images and what an encoder gave for images; give one of the two.")
        seen = images if encoded is None else encoded
        self.lengths = torch.tensor([len(row) for row in ids])
        if int(self.lengths.min()) < 2:
            short = int(self.lengths.argmin())
            raise DataError(f"sequence {short} has {len(ids[short])} tokens; expected two or more, the first is given.")
        if seen is None and image is not None:
            raise ShapeError("there are numbers of images, but no images.")
        self.image = None
        if seen is not None:
            self.image = torch.arange(len(ids)) if image is None else torch.as_tensor(image)
            if len(self.image) != len(ids) or int(self.image.max()) >= len(seen):
                raise ShapeError(f"{len(ids)} sequences, {len(self.image)} numbers and {len(seen)} images do not fit.")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens that are to be said."""
        return int(self.lengths.sum()) - len(self)

    def select(self, rows: Tensor) -> "TokenRows":
        """Some of the rows, over the same images."""
        ids = [self.row(row) for row in rows.tolist()]
        image = None if self.image is None else self.image[rows]
        return TokenRows(ids, pad=self.pad, images=self.images, image=image, prepare=self.prepare, encoded=self.encoded)

    def row(self, row: int) -> list[int]:
        """The tokens of a row."""
        begin, end = self.ids.starts[row], self.ids.starts[row + 1]
        return self.ids.values[begin:end].tolist()  # type: ignore[no-any-return]

    def pixels(self, rows: Tensor) -> Tensor | None:
        """The images of rows as the encoder takes them, None where there are none."""
        if self.images is None or self.image is None:
            return None
        found = self.images[self.image[rows]]
        return found.float() / 255 if self.prepare is None else self.prepare(found)

    def batch(self, rows: Tensor, augment: Augment | None = None, generator: Generator | None = None) -> Batch:
        """Some rows: input_ids and attention_mask [batch token] and pixel_values or encoded; labels
        [batch token - 1], the next token at every place and -100 behind the end."""
        longest = int(self.lengths[rows].max())
        ids = torch.full((len(rows), longest), self.pad)
        for i, row in enumerate(rows.tolist()):
            ids[i, : self.lengths[row]] = torch.tensor(self.row(row))
        mask = torch.arange(longest) < self.lengths[rows][:, None]
        inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask.long()}
        pixels = self.pixels(rows)
        if pixels is not None:
            inputs["pixel_values"] = pixels
        if self.encoded is not None and self.image is not None:
            inputs["encoded"] = self.encoded[self.image[rows]]
        labels = ids[:, 1:].masked_fill(~mask[:, 1:], NO_TOKEN)
        return Batch(augment(inputs, generator or Generator()) if augment else inputs, labels, rows)

    def fingerprint(self) -> str:
        """A checksum of the tokens and images."""
        told = hashlib.sha256(self.ids.values.numpy().tobytes() + self.lengths.numpy().tobytes())
        for seen in (self.image, self.images, self.encoded):
            told.update(b"" if seen is None else seen.contiguous().numpy().tobytes())
        return told.hexdigest()


def next_tokens(batch: Batch) -> Int64[Tensor, "token"]:
    """The tokens of a batch that are to be said, row after row."""
    labels = torch.as_tensor(batch.labels)
    return labels[labels >= 0]
