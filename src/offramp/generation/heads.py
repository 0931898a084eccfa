"""Vocabulary heads behind a decoder's layers."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from offramp.errors import ValueRangeError
from offramp.generation.decoders import Decoder, decoder_of
from offramp.generation.rehearsal import rehearsed
from offramp.generation.rules import TokenPolicy

__all__ = ["FactorisedHead", "FullHead", "SharedHead", "ShortlistHead", "TokenExits", "attach_tokens"]


class SharedHead(nn.Module):
    """The decoder's own last norm and vocabulary head: no parameters of its own, and all of their work."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self._decoder = [decoder]  # in a list, so that its weights are not counted as this head's

    def forward(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch token"]:
        """Logits over the vocabulary."""
        (decoder,) = self._decoder
        return decoder.logits(decoder.finish(hidden))


class FullHead(nn.Module):
    """A norm and a matrix from hidden states to the vocabulary, begun as the decoder's own: BEEM's, for captions."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(decoder.width)
        self.out = nn.Linear(decoder.width, decoder.vocabulary, bias=False)
        with torch.no_grad():
            self.out.weight.copy_(decoder.head.weight)

    def forward(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch token"]:
        """Logits over the vocabulary."""
        return self.out(self.norm(hidden))  # type: ignore[no-any-return]


class FactorisedHead(nn.Module):
    """A norm, a matrix down to `rank` and one from there to the vocabulary: rank / width of a full head's work."""

    def __init__(self, decoder: Decoder, rank: int | None = None) -> None:
        super().__init__()
        rank = min(64, decoder.width) if rank is None else rank
        if not 1 <= rank <= decoder.width:
            raise ValueRangeError(f"the rank is {rank}; expected 1 to the decoder's width, {decoder.width}.")
        self.norm = nn.LayerNorm(decoder.width)
        self.down = nn.Linear(decoder.width, rank, bias=False)
        self.out = nn.Linear(rank, decoder.vocabulary)

    def forward(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch token"]:
        """Logits over the vocabulary."""
        return self.out(self.down(self.norm(hidden)))  # type: ignore[no-any-return]


class ShortlistHead(nn.Module):
    """A norm and a matrix from hidden states to some tokens, and one number for all others together.

    The others share their probability evenly, so that none of them is sure: a token that is not on the list goes on to
    later exits under any policy that asks for confidence.

    Args:
        tokens: that it can say, such as those that are said most often.
    """

    tokens: Tensor

    def __init__(self, decoder: Decoder, tokens: Int[Tensor, "listed"]) -> None:
        super().__init__()
        listed = torch.as_tensor(tokens).unique()
        others = decoder.vocabulary - len(listed)
        if not len(listed) or others < 1 or not 0 <= int(listed.min()) <= int(listed.max()) < decoder.vocabulary:
            raise ValueRangeError(
                f"the shortlist has {len(listed)} tokens; expected 1 to {decoder.vocabulary - 1} of the numbers 0 to "
                f"{decoder.vocabulary - 1}."
            )
        self.register_buffer("tokens", listed)
        self.norm = nn.LayerNorm(decoder.width)
        self.out = nn.Linear(decoder.width, len(listed) + 1)
        self.vocabulary, self.share = decoder.vocabulary, math.log(others)

    def forward(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch token"]:
        """Logits over the vocabulary."""
        said = self.out(self.norm(hidden))
        others = said[..., -1:] - self.share
        whole = others.expand(*said.shape[:-1], self.vocabulary)
        return whole.index_copy(-1, self.tokens, said[..., :-1])


class TokenExits(nn.Module):
    """A decoder with vocabulary heads behind some of its layers, the last of which is the decoder's own.

    Args:
        backbone: the language model, or the encoder and decoder; its weights are used as they are.
        decoder: from `decoder_of`.
        at: the layers with an exit behind them, 0-based and rising; the last layer is always an exit besides.
        heads: one for each of `at`.
        made: how they were asked of `attach_tokens`, to be made again.

    With `rehearse` (True unless set) every exit learns behind keys and values as exits leave them: see `rehearsed`.
    """

    per_token = True  # it says something of every token, so that a row has many labels

    def __init__(
        self, backbone: nn.Module, decoder: Decoder, at: tuple[int, ...], heads: list[nn.Module], made: dict[str, Any]
    ) -> None:
        super().__init__()
        self.made = made
        self.backbone, self.heads = backbone, nn.ModuleList(heads)
        self.decoder, self.at = decoder, at
        self.gates: nn.ModuleList | None = None
        self.rehearse = True

    @property
    def exits(self) -> int:
        """Exits, the last one included."""
        return len(self.at) + 1

    @property
    def classes(self) -> int:
        """Tokens of the vocabulary."""
        return self.decoder.vocabulary

    def said(self, k: int, hidden: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch token"]:
        """The logits of exit k for hidden states behind its layer."""
        if k == len(self.at):
            return self.decoder.logits(self.decoder.finish(hidden))
        return self.heads[k](hidden)  # type: ignore[no-any-return]

    def opened(self, k: int, hidden: Float[Tensor, "batch dim"], rule: TokenPolicy | None) -> list[bool] | None:
        """Whether exit k's gate lets its vocabulary be looked at, by row; None where no gate is asked."""
        if rule is None or rule.gate is None or self.gates is None or k == len(self.at):
            return None
        return (self.gates[k](hidden)[:, 0].sigmoid() >= rule.gate).tolist()  # type: ignore[no-any-return]

    def encode(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch memory dim"]:
        """What the decoder's layers look at.

        Raises:
            ValueRangeError: there is no encoder.
        """
        whole: Any = self.backbone
        if not hasattr(whole, "encoder"):
            raise ValueRangeError(f"{type(whole).__name__} has no encoder, so it takes no images.")
        encoded = whole.encoder(pixels).last_hidden_state
        return self.narrowed(encoded)

    def narrowed(self, encoded: Float[Tensor, "batch memory wide"]) -> Float[Tensor, "batch memory dim"]:
        """An encoder's states as wide as the decoder's."""
        whole: Any = self.backbone
        return whole.enc_to_dec_proj(encoded) if hasattr(whole, "enc_to_dec_proj") else encoded

    def looked_at(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch memory dim"] | None:
        """What the decoder's layers look at besides, None where there is no encoder's work in the inputs."""
        if "encoded" in inputs:
            return self.narrowed(inputs["encoded"])
        return self.encode(inputs["pixel_values"]) if "pixel_values" in inputs else None

    def forward(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "exit token cls"]:
        """The logits of every exit for every token that is to be said, row after row.

        Args:
            inputs: input_ids and attention_mask [batch token], padded behind; pixel_values for an encoder, or
                `encoded`, what it gave before.
        """
        if self.training and self.rehearse:
            self._fits(inputs["input_ids"])
            return rehearsed(self, inputs)
        states, last = self.states(inputs)
        return torch.stack([*(head(state) for head, state in zip(self.heads, states, strict=True)), last])

    def plain(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "token cls"]:
        """The last exit's logits alone."""
        _, last, kept = self._states(inputs, hidden=False)
        return last[:, :-1][kept]

    def states(
        self, inputs: Mapping[str, Tensor]
    ) -> tuple[list[Float[Tensor, "token dim"]], Float[Tensor, "token cls"]]:
        """(what every exit but the last reads, the last exit's logits) for every token that is to be said."""
        states, last, kept = self._states(inputs)
        return [states[j + 1][:, :-1][kept] for j in self.at], last[:, :-1][kept]

    def _states(self, inputs: Mapping[str, Tensor], hidden: bool = True) -> tuple[Any, Tensor, Tensor]:
        """(hidden states before and behind every layer, logits behind the last, which tokens are to be said)."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        self._fits(ids)
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        encoded = self.looked_at(inputs)
        if encoded is not None:
            given["encoder_hidden_states"] = encoded
        out = self.decoder.network(**given, output_hidden_states=hidden)
        return out.hidden_states if hidden else None, out.logits, mask[:, 1:].bool()

    def _fits(self, ids: Int[Tensor, "batch token"]) -> None:
        """Nothing, where the decoder has room for the rows and knows their tokens."""
        if ids.shape[1] > self.decoder.context:
            raise ValueRangeError(
                f"a row has {ids.shape[1]} tokens; the decoder has room for {self.decoder.context}. Cut the rows."
            )
        if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < self.classes:
            raise ValueRangeError(f"a row has a token that is not in 0 to {self.classes - 1}: the vocabulary's size.")


def attach_tokens(
    network: Any,
    at: tuple[int, ...] | None = None,
    *,
    head: str = "factorised",
    rank: int | None = None,
    shortlist: Int[Tensor, "listed"] | None = None,
) -> TokenExits:
    """A language model of transformers with vocabulary heads behind some of its layers.

    Args:
        network: e.g. GPT2LMHeadModel, LlamaForCausalLM, VisionEncoderDecoderModel; it is used as it is, not copied.
        at: layers, 0-based; every one but the last unless given.
        head: "factorised" (to `rank` and from there to the vocabulary), "shortlist" (some tokens, and the rest as one),
            "full" (the paper's), or "shared" (the decoder's own).
        rank: of factorised heads; 64 unless given, or the width where that is less.
        shortlist: token numbers, for heads with a shortlist.

    Raises:
        ValueRangeError: the network, a layer or the head is none that can be used.
    """
    decoder = decoder_of(getattr(network, "decoder", network))
    if hasattr(network, "encoder") and not getattr(decoder, "crosses", False):
        raise ValueRangeError(
            f"the decoder is a {type(decoder.network).__name__}, which cannot look at an encoder here; "
            "expected one of GPT-2's kind with add_cross_attention."
        )
    if isinstance(at, int):
        raise ValueRangeError(f"exits are wanted behind {at}; expected layers such as ({at},).")
    at = tuple(range(decoder.layers - 1)) if at is None else tuple(at)
    if list(at) != sorted(set(at)) or not all(0 <= j < decoder.layers - 1 for j in at):
        raise ValueRangeError(
            f"exits are wanted behind the layers {at}; expected rising numbers from 0 to {decoder.layers - 2}, as the "
            "last layer is an exit anyway."
        )
    if (shortlist is not None) != (head == "shortlist"):
        given = "is" if shortlist is not None else "is not"
        raise ValueRangeError(f"the head is {head!r} and a shortlist {given} given; expected both or neither.")
    kinds = {
        "factorised": lambda: FactorisedHead(decoder, rank), "full": lambda: FullHead(decoder),
        "shared": lambda: SharedHead(decoder), "shortlist": lambda: ShortlistHead(decoder, torch.as_tensor(shortlist)),
    }  # fmt: skip
    if head not in kinds:
        raise ValueRangeError(f"the head is {head!r}; expected one of {', '.join(kinds)}.")
    listed = None if shortlist is None else torch.as_tensor(shortlist).tolist()
    made = {"at": list(at), "head": head, "rank": rank, "shortlist": listed}
    heads = [kinds[head]().to(decoder.head.weight) for _ in at]  # where the decoder is, and in its precision
    return TokenExits(network, decoder, at, heads, made)
