"""Confidence scores of logits. Each rises with confidence and is computed in float32, whatever the logits' dtype."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.errors import ValueRangeError

__all__ = ["margin", "max_prob", "neg_entropy", "probabilities"]


def probabilities(logits: Float[Tensor, "*batch cls"]) -> Float[Tensor, "*batch cls"]:
    """Softmax over classes, in float32: a threshold fitted in one dtype must hold in another."""
    return torch.softmax(logits.float(), dim=-1)


def max_prob(logits: Float[Tensor, "*batch cls"]) -> Float[Tensor, "*batch"]:
    """The largest probability, in (0, 1]."""
    return probabilities(logits).amax(dim=-1)


def margin(logits: Float[Tensor, "*batch cls"]) -> Float[Tensor, "*batch"]:
    """The largest probability minus the second largest, in [0, 1].

    Raises:
        ValueRangeError: there is only one class.
    """
    if logits.shape[-1] < 2:
        raise ValueRangeError(f"there is no margin of {logits.shape[-1]} class; expected at least 2 classes.")
    top = probabilities(logits).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def neg_entropy(logits: Float[Tensor, "*batch cls"]) -> Float[Tensor, "*batch"]:
    """1 + sum_c p_c log p_c / log cls: 1 for a certain row, 0 for a uniform one.

    Raises:
        ValueRangeError: there is only one class, whose entropy is always 0.
    """
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueRangeError(f"entropy of {classes} class is always 0; expected at least 2 classes.")
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return 1.0 + (log_p.exp() * log_p).sum(dim=-1) / math.log(classes)
