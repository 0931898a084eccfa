"""What transformers' own generation writes, with its own cache, to compare with."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput


def written(
    network: Any, given: list[list[int]], new: int, *, end: int | None = None, states: Tensor | None = None, **more: Any
) -> list[list[int]]:
    """Tokens behind each text of `given`, which are padded in front; shorter rows have more of `end` behind it.

    Args:
        network: a decoder, or an encoder with a decoder where `states`, what the encoder gave, are there.
    """
    longest = max(map(len, given))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in given])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in given])
    options = {"do_sample": False, "max_new_tokens": new, "eos_token_id": end, "pad_token_id": end or 0, **more}
    if states is None:
        said = network.generate(ids, attention_mask=mask, **options)
    else:
        seen = BaseModelOutput(last_hidden_state=states)
        said = network.generate(encoder_outputs=seen, decoder_input_ids=ids, decoder_attention_mask=mask, **options)
    return said[:, longest:].tolist()
