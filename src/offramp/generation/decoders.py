"""Decoders of transformers, taken apart: embedding, layers that read and write a cache of ours, and the last norm.

The modules and their weights stay those of transformers; the products between them are written out here, because a
layer's own forward can neither be left out nor be given keys and values of another hidden state than the one it sees.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from offramp.errors import ValueRangeError
from offramp.generation.memory import Memory

__all__ = ["Decoder", "GPT2Decoder", "LlamaDecoder", "decoder_of"]

Hidden = Float[Tensor, "batch new dim"]
Keys = Float[Tensor, "batch head new each"]
#: (layer, keys, values of the new tokens) to (all keys, all values, mask or None): what a cache does.
Store = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]


@runtime_checkable
class Decoder(Protocol):
    """What generation needs of a decoder. Positions count the tokens of a row from 0, without padding."""

    network: nn.Module
    head: nn.Linear
    blocks: nn.ModuleList
    layers: int
    width: int
    vocabulary: int
    context: int
    heads: int
    head_width: int

    def embed(self, ids: Int[Tensor, "batch new"], positions: Int[Tensor, "batch new"]) -> Hidden:
        """What enters the first layer."""
        ...

    def layer(self, j: int, hidden: Hidden, positions: Tensor, store: Store, memory: Memory | None = None) -> Hidden:
        """What layer j makes of the new tokens; the store has got their keys and values."""
        ...

    def keys_values(self, j: int, hidden: Hidden, positions: Tensor) -> tuple[Keys, Keys]:
        """The keys and values that layer j would keep of these hidden states, which is all that later tokens need."""
        ...

    def memory(self, encoded: Float[Tensor, "batch memory dim"]) -> Memory:
        """The keys and values of what an encoder gave, for the layers' cross-attention."""
        ...

    def once(self, j: int) -> list[nn.Module]:
        """Parts of layer j that work once for a text, not for every token."""
        ...

    def finish(self, hidden: Tensor) -> Tensor:
        """The hidden state after the last norm, which vocabulary heads read."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """The decoder's own vocabulary head, on what `finish` gave."""
        ...


class GPT2Decoder:
    """GPT-2 and what is built like it, with cross-attention where it has it."""

    def __init__(self, network: Any) -> None:
        body, config = network.transformer, network.config
        self.network, self.body, self.blocks, self.head = network, body, body.h, network.lm_head
        self.layers, self.width, self.vocabulary = len(body.h), config.hidden_size, config.vocab_size
        self.context, self.heads = config.max_position_embeddings, config.num_attention_heads
        self.head_width = self.width // self.heads
        self.crosses = bool(config.add_cross_attention)
        self.tanh_gelu = config.activation_function == "gelu_new"  # transformers takes eight operations for it
        if config.reorder_and_upcast_attn:
            raise ValueRangeError("GPT-2 with reorder_and_upcast_attn is not supported; set it to False.")

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """What enters the first layer."""
        hidden = self.body.wte(ids) + self.body.wpe(positions)
        return self.body.drop(hidden) if self.body.training else hidden  # type: ignore[no-any-return]

    def layer(self, j: int, hidden: Tensor, positions: Tensor, store: Store, memory: Memory | None = None) -> Tensor:
        """What layer j makes of the new tokens."""
        block = self.body.h[j]
        query, key, value = block.attn.c_attn(block.ln_1(hidden)).split(self.width, dim=2)
        keys, values, mask = store(j, self._apart(key), self._apart(value))
        hidden = hidden + self._look(block.attn, query, keys, values, mask)
        if memory is not None:
            cross = block.crossattention
            query = cross.q_attn(block.ln_cross_attn(hidden))
            hidden = hidden + self._look(cross, query, *memory[j], None)
        mlp, normed = block.mlp, block.ln_2(hidden)
        if mlp.training or not self.tanh_gelu:
            return hidden + mlp(normed)  # type: ignore[no-any-return]
        return hidden + mlp.c_proj(F.gelu(mlp.c_fc(normed), approximate="tanh"))  # type: ignore[no-any-return]

    def keys_values(self, j: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that layer j would keep."""
        block = self.body.h[j]
        columns = block.attn.c_attn
        both = F.linear(block.ln_1(hidden), columns.weight[:, self.width :].t(), columns.bias[self.width :])
        key, value = both.split(self.width, dim=-1)
        return self._apart(key), self._apart(value)

    def memory(self, encoded: Tensor) -> Memory:
        """The keys and values of what an encoder gave."""
        if not self.crosses:
            raise ValueRangeError("the decoder has no cross-attention; give no encoder, or set add_cross_attention.")

        def made(j: int, states: Tensor) -> tuple[Tensor, Tensor]:
            key, value = self.body.h[j].crossattention.c_attn(states).split(self.width, dim=2)
            return self._apart(key), self._apart(value)

        return Memory(made, encoded)

    def once(self, j: int) -> list[nn.Module]:
        """The keys and values of what an encoder gave."""
        return [self.body.h[j].crossattention.c_attn] if self.crosses else []

    def finish(self, hidden: Tensor) -> Tensor:
        """The hidden state after the last norm."""
        return self.body.ln_f(hidden)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """The decoder's own vocabulary head."""
        return self.head(hidden)  # type: ignore[no-any-return]

    def _apart(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)

    def _look(self, attention: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        drop = attention.attn_dropout.p if attention.training else 0.0
        seen = F.scaled_dot_product_attention(
            self._apart(query), keys, values, attn_mask=mask, dropout_p=drop, scale=attention.scaling
        )
        found = attention.c_proj(seen.transpose(1, 2).flatten(2))
        return attention.resid_dropout(found) if attention.training else found  # type: ignore[no-any-return]


class LlamaDecoder:
    """Llama, Mistral and Qwen: rotary positions, grouped keys, gated layers; norms of keys where they have them."""

    def __init__(self, network: Any) -> None:
        body, config = network.model, network.config
        self.network, self.body, self.blocks, self.head = network, body, body.layers, network.lm_head
        self.layers, self.width, self.vocabulary = len(body.layers), config.hidden_size, config.vocab_size
        self.context, self.heads = config.max_position_embeddings, config.num_key_value_heads
        self.head_width = getattr(config, "head_dim", None) or self.width // config.num_attention_heads
        self.groups = config.num_attention_heads // self.heads
        if getattr(body.rotary_emb, "rope_type", "") == "longrope":  # its turns depend on the longest row of a batch
            raise ValueRangeError("rotary positions of the type 'longrope' are not supported; set another rope_type.")
        window = getattr(config, "sliding_window", None)
        if window is not None and getattr(config, "use_sliding_window", True):
            self.context = min(self.context, window)  # beyond it, a layer would have to forget

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """What enters the first layer."""
        return self.body.embed_tokens(ids)  # type: ignore[no-any-return]

    def layer(self, j: int, hidden: Tensor, positions: Tensor, store: Store, memory: Memory | None = None) -> Tensor:
        """What layer j makes of the new tokens."""
        block = self.body.layers[j]
        attention, seen = block.self_attn, block.input_layernorm(hidden)
        turn = self.body.rotary_emb(hidden, position_ids=positions)
        query = _turned(self._normed(attention, "q_norm", self._apart(attention.q_proj(seen))), turn)
        keys, values, mask = store(j, *self._kept(attention, seen, turn))
        if self.groups > 1:
            keys, values = (x.repeat_interleave(self.groups, dim=1) for x in (keys, values))
        drop = attention.attention_dropout if attention.training else 0.0
        found = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, dropout_p=drop, scale=attention.scaling
        )
        hidden = hidden + attention.o_proj(found.transpose(1, 2).flatten(2))
        return hidden + block.mlp(block.post_attention_layernorm(hidden))  # type: ignore[no-any-return]

    def keys_values(self, j: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that layer j would keep."""
        block = self.body.layers[j]
        turn = self.body.rotary_emb(hidden, position_ids=positions)
        return self._kept(block.self_attn, block.input_layernorm(hidden), turn)

    def memory(self, encoded: Tensor) -> Memory:
        """These decoders look at no encoder."""
        raise ValueRangeError("the decoder has no cross-attention; expected one of GPT-2's kind with it.")

    def once(self, j: int) -> list[nn.Module]:
        """Nothing: there is no cross-attention."""
        return []

    def finish(self, hidden: Tensor) -> Tensor:
        """The hidden state after the last norm."""
        return self.body.norm(hidden)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """The decoder's own vocabulary head."""
        return self.head(hidden)  # type: ignore[no-any-return]

    def _kept(self, attention: Any, seen: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        key = self._normed(attention, "k_norm", self._apart(attention.k_proj(seen)))
        return _turned(key, turn), self._apart(attention.v_proj(seen))

    @staticmethod
    def _normed(attention: Any, name: str, heads: Tensor) -> Tensor:
        norm = getattr(attention, name, None)  # Qwen3 has them
        return heads if norm is None else norm(heads)

    def _apart(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


def _turned(heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Heads [batch head new each] turned by their positions (RoFormer, Su et al. 2021, section 3.2.2)."""
    cos, sin = (part.unsqueeze(1) for part in turn)
    one, other = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-other, one), dim=-1) * sin


KINDS: dict[str, Callable[[Any], Decoder]] = {
    "gpt2": GPT2Decoder,
    "llama": LlamaDecoder,
    "mistral": LlamaDecoder,
    "qwen2": LlamaDecoder,
    "qwen3": LlamaDecoder,
}


def decoder_of(network: Any) -> Decoder:
    """A causal language model of transformers as a decoder that can be taken apart.

    Raises:
        ValueRangeError: it is of no kind that is supported; the message names those that are.
    """
    kind = getattr(getattr(network, "config", None), "model_type", type(network).__name__)
    if kind not in KINDS or not hasattr(network, "lm_head"):
        raise ValueRangeError(
            f"the decoder is of kind {kind!r} ({type(network).__name__}); expected a language model with a vocabulary "
            f"head of kind {', '.join(KINDS)}."
        )
    return KINDS[kind](network)
