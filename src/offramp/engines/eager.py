"""Stages in torch's eager mode, in the model's own precision or under bf16 autocast."""

import contextlib
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.engines.base import Staged
from offramp.engines.lower import lowered
from offramp.heads import Head
from offramp.inputs import Inputs, tensors_of
from offramp.model import ExitModel
from offramp.stages import Carry, Stages, stages_of_parts
from offramp.units import parts_of, precision_of

__all__ = ["Eager"]

NOTHING: Any = contextlib.nullcontext()


class Eager(Staged):
    """torch as it is: no compilation, any device, and changes of the model's weights are seen at once.

    With precision "bf16" on a model in fp32, products run in bf16 under autocast, with weights that are cast when they
    were changed and no sooner; normalisations and the policy's steps stay in fp32.
    """

    name: ClassVar[str] = "eager"
    own: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16", "fp64")
    others: ClassVar[tuple[str, ...]] = ("bf16",)
    devices: ClassVar[tuple[str, ...]] = ("any",)

    def __init__(self, model: ExitModel, precision: str | None = None, threads: int | None = None) -> None:
        super().__init__(model, precision, threads)
        self._autocast = self.precision == "bf16" != precision_of(model)
        self._kind = tensors_of(model.example)[0].device.type
        if threads is not None:
            torch.set_num_threads(threads)
        self._versions: tuple[int, ...] = ()
        self._stages: Stages = model.stages()
        self._cut()
        # several heads average over the same tokens
        self._shares = any(isinstance(head, Head) and head.averages for head in model.heads)

    def _precise(self) -> Any:
        return torch.autocast(self._kind, torch.bfloat16) if self._autocast else contextlib.nullcontext()

    def start(self, inputs: Inputs) -> Carry:
        """The carry into the first stage; the model is cut again here when it was changed."""
        return self._cut().start(inputs)

    def _cut(self) -> Stages:
        """The stages of the model as it is now."""
        stages = self.model.stages()
        if not self._autocast:
            self._stages = stages
            return stages
        now = (id(stages), *(0 if p.is_inference() else p._version for p in self.model.parameters()))
        if now != self._versions:
            self._stages, self._versions = stages_of_parts(lowered(parts_of(self.model))), now
        return self._stages

    def run(self, k: int, carry: Carry) -> tuple[Tensor, Carry | None]:
        """Stage k: the tap and what goes on; the logits and None behind the last."""
        if not self._autocast:
            return self._stages.run(k, carry)
        with self._precise():
            return self._stages.run(k, carry)

    def head(self, k: int, tap: Tensor, carry: Carry, signals: bool) -> tuple[Tensor, Tensor | None]:
        """Exit k's logits, and its signals where they are asked for and it has some."""
        model, mask = self.model, carry.mask
        with self._precise() if self._autocast else NOTHING:
            if signals:
                return model.evidence(k, tap, mask)
            weights = None if mask is None or not self._shares else carry.weights(tap.dtype)
            return model.head_logits(k, tap, mask, weights), None

    def whole(self, inputs: Inputs) -> Float[Tensor, "batch cls"]:
        """The network's own logits, from the same graph, not cut."""
        with self._precise():
            return self._cut().whole(inputs).float()
