"""Beams, and everything else that transformers' own `generate` can do, with tokens that leave at exits."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.errors import ValueRangeError
from offramp.generation.given import Ends, checked_encoded, checked_prompts, ends_of, until
from offramp.generation.heads import TokenExits
from offramp.generation.loop import Generated, Run
from offramp.generation.rules import TokenPolicy, as_rule
from offramp.graph import eval_mode
from offramp.policies.base import Policy

__all__ = ["search"]

PAD = 0  # what is in front of shorter prompts; no layer reads it
BLIND = {"length_penalty", "early_stopping"}  # options that look at no token, padding or not


def search(
    model: TokenExits,
    policy: Policy | TokenPolicy | None,
    prompts: Sequence[Sequence[int]],
    *,
    beams: int = 4,
    max_new_tokens: int = 32,
    end: Ends = None,
    encoded: Float[Tensor, "row memory dim"] | None = None,
    **options: Any,
) -> Generated:
    """The best text of a beam search for every prompt; beams leave at exits of their own, and their caches follow them.

    transformers' `generate` searches, over our layers and cache: slower per token than `generate`, and with everything
    that it offers.

    Args:
        model, policy, prompts, max_new_tokens, end, encoded: as for `generate`.
        beams: texts that are followed at once for each prompt.
        options: for transformers' `generate`, such as length_penalty, no_repeat_ngram_size or repetition_penalty; with
            such as look at tokens, prompts of one length go together.

    Raises:
        ValueRangeError, ShapeError: as `generate`; or there is no beam.
    """
    from transformers import GenerationConfig

    if beams < 1:
        raise ValueRangeError(f"beams is {beams}; expected at least 1.")
    lengths = checked_prompts(model, prompts, max_new_tokens)
    if len(set(lengths)) > 1 and not set(options) <= BLIND:
        return _by_length(model, policy, prompts, lengths, encoded, beams=beams, max_new_tokens=max_new_tokens, end=end,
                          **options)  # fmt: skip
    ends, encoded = ends_of(end, model.classes), checked_encoded(model, encoded, len(lengths))
    longest = max(lengths)
    device = next(model.parameters()).device
    ids = torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in prompts], device=device)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long().to(device)
    memory = None if encoded is None else encoded.repeat_interleave(beams, dim=0)
    rows = [length for length in lengths for _ in range(beams)]
    rule = as_rule(policy, model.exits, gates=model.gates is not None)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, num_beams=beams, do_sample=False, eos_token_id=sorted(ends) or None,
        bos_token_id=None, pad_token_id=min(ends, default=PAD), return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    with eval_mode(model), torch.inference_mode():
        searcher = _made(model, Run(model, rule, rows, max_new_tokens, memory))
        found = searcher.generate(
            ids, attention_mask=mask, generation_config=config, past_key_values=_Handle(searcher.run), **options
        )
    tokens = [until(row, ends) for row in found.sequences[:, longest:].tolist()]
    beam_of = found.beam_indices.tolist() if beams > 1 else [[i] * max_new_tokens for i in range(len(prompts))]
    exits = [
        tuple(searcher.left[t][beam_of[row][t]] for t in range(len(text))) for row, text in enumerate(tokens)
    ]  # fmt: skip
    return Generated(tuple(map(tuple, tokens)), tuple(exits))


def _by_length(
    model: TokenExits, policy: Policy | TokenPolicy | None, prompts: Sequence[Sequence[int]], lengths: Sequence[int],
    encoded: Tensor | None, **options: Any,
) -> Generated:  # fmt: skip
    """Prompts of one length at a time: penalties look at all tokens, and must not see padding."""
    found: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    checked_encoded(model, encoded, len(lengths))
    for length in sorted(set(lengths)):
        which = [i for i, each in enumerate(lengths) if each == length]
        memory = None if encoded is None else encoded[which]
        said = search(model, policy, [prompts[i] for i in which], encoded=memory, **options)
        found.update(zip(which, zip(said.tokens, said.exits, strict=True), strict=True))
    tokens, exits = zip(*(found[i] for i in range(len(lengths))), strict=True)
    return Generated(tokens, exits)


class _Handle:
    """What transformers holds for a cache, to say when beams change places."""

    is_compileable = False

    def __init__(self, run: Run) -> None:
        self.run = run

    def get_seq_length(self) -> int:
        """Tokens of the first row that are there: 0 before the prompts are read."""
        return self.run.cache.filled[0][0]

    def reorder_cache(self, rows: Tensor) -> None:
        """Row i goes on with what row rows[i] was."""
        order = rows.tolist()
        if order != list(range(len(order))):
            self.run.reorder(order)


def _made(model: TokenExits, run: Run) -> Any:
    """A network in transformers' eyes: one that generates, and whose layers and cache are ours."""
    from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    network: Any = model.decoder.network

    class Searcher(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
        config_class = type(network.config)
        main_input_name = "input_ids"
        _supports_sdpa = True
        device, dtype = run.device, network.dtype

        def __init__(self) -> None:
            super().__init__(network.config)
            self.generation_config = GenerationConfig()  # what a checkpoint wishes is not asked for here
            self.run, self.left = run, list[list[int]]()

        @classmethod
        def can_generate(cls) -> bool:
            return True

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **_: Any
        ) -> Any:
            if not self.left:
                seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                rows = [ids[flags.bool()].tolist() for ids, flags in zip(input_ids, seen, strict=True)]
                logits, left = self.run.begin(rows)
            else:
                logits, left = self.run.step(list(range(len(input_ids))), input_ids[:, -1].tolist())
            self.left.append(left)
            return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=past_key_values)

    return Searcher()
