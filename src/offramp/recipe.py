"""How to train, and what came of it: two values."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from offramp.errors import ValueRangeError

__all__ = ["EpochReport", "Recipe", "TrainReport"]

CHOICES: dict[str, tuple[Any, ...]] = {
    "optimizer": ("adamw", "sgd"),
    "schedule": ("linear", "cosine", "step", "constant"),
    "precision": ("fp32", "bf16"),
    "frozen": (None, "backbone"),
    "gradients": ("sum", "equilibrium", "local", "detached"),
    "channels_last": (False, True),
    "bucket": (False, True),
}


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        epochs: passes over the data.
        batch_size: rows per step; a DataLoader keeps its own.
        lr: the highest learning rate; `head_lr` is that of the heads' own parameters (None: the same).
        optimizer: "adamw" (fused where torch can), or "sgd" with Nesterov momentum.
        momentum: of sgd.
        weight_decay: with adamw on matrices and filters alone, not on biases and norms; with sgd on everything.
        schedule: how the rate falls after the warm-up: "linear" or "cosine" to zero, "step" to a tenth after one third
            and again after two thirds, or "constant".
        warmup: the share of the steps over which the rate rises from zero.
        clip_norm: the largest norm of the gradient; None leaves it.
        precision: "fp32", or "bf16" for autocast (weights and loss stay float32).
        channels_last: images and filters with channels innermost, which bf16 convolutions like.
        label_smoothing: the share of every label that is spread over all classes.
        augment: called with the inputs of a training batch and a `torch.Generator`; returns inputs. E.g. `CropFlip()`.
        seed: decides order, augmentation and dropout.
        bucket: put rows of about the same length into a batch (token inputs from `Examples`).
        frozen: "backbone" trains the heads alone, with the original model in eval mode.
        gradients: how the exits' gradients meet in the backbone: "sum" adds them up; "equilibrium" scales them so that
            no stage gets more for having more exits behind it (gradient equilibrium, Li et al. 2019, section 3.1);
            "local" lets those of an exit reach no further back than the exit before it; "detached" keeps them in the
            heads, so that the backbone learns from the last exit alone.
        layer_decay: the learning rate of the backbone's part behind the last tap is `lr`, that of each part before is
            this times as large as the next one's (ULMFiT, Howard and Ruder 2018, section 3.2); None: the same for all.
        checkpoint_every_s: seconds between checkpoints within an epoch; one more follows every epoch.
        checkpoint_every_steps: steps between checkpoints, instead of seconds.

    Raises:
        ValueRangeError: a value is out of range; the message says which and what is allowed.
    """

    epochs: int = 3
    batch_size: int = 32
    lr: float = 5e-5
    head_lr: float | None = None
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.01
    schedule: str = "linear"
    warmup: float = 0.06
    clip_norm: float | None = 1.0
    precision: str = "fp32"
    channels_last: bool = False
    label_smoothing: float = 0.0
    augment: Callable[..., Any] | None = None
    seed: int = 0
    bucket: bool = True
    frozen: str | None = None
    gradients: str = "sum"
    layer_decay: float | None = None
    checkpoint_every_s: float = 300.0
    checkpoint_every_steps: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueRangeError(f"Recipe.{name} is {getattr(self, name)!r}; expected one of {allowed}.")
        self._whole("epochs", 1)
        self._whole("batch_size", 1)
        self._whole("seed", 0)
        if self.checkpoint_every_steps is not None:
            self._whole("checkpoint_every_steps", 1)
        self._real("lr", 0.0, math.inf, "above 0", above=True)
        self._real("momentum", 0.0, 1.0, "from 0 to below 1", below=True)
        self._real("weight_decay", 0.0, math.inf, "0 or more")
        self._real("warmup", 0.0, 1.0, "a share of the steps from 0 to below 1", below=True)
        self._real("label_smoothing", 0.0, 1.0, "from 0 to below 1", below=True)
        self._real("checkpoint_every_s", 0.0, math.inf, "above 0", above=True)
        if self.layer_decay is not None:
            self._real("layer_decay", 0.0, 1.0, "above 0 and at most 1, or None", above=True)
        for name in ("head_lr", "clip_norm"):
            if getattr(self, name) is not None:
                self._real(name, 0.0, math.inf, "above 0, or None", above=True)
        if self.augment is not None and not callable(self.augment):
            raise ValueRangeError(f"Recipe.augment is {self.augment!r}; expected None or a callable, e.g. CropFlip().")

    def _whole(self, name: str, low: int) -> None:
        got = getattr(self, name)
        if not isinstance(got, int) or isinstance(got, bool) or got < low:
            raise ValueRangeError(f"Recipe.{name} is {got!r}; expected a whole number, {low} or more.")

    def _real(
        self, name: str, low: float, high: float, wanted: str, *, above: bool = False, below: bool = False
    ) -> None:
        got = getattr(self, name)
        number = isinstance(got, int | float) and not isinstance(got, bool) and math.isfinite(got)
        if not number or not low <= got <= high or (above and got == low) or (below and got == high):
            raise ValueRangeError(f"Recipe.{name} is {got!r}; expected a finite number, {wanted}.")
        object.__setattr__(self, name, float(got))

    def rate(self, done: int, steps: int) -> float:
        """The factor on the learning rate for the step after `done` of `steps`."""
        rising = round(self.warmup * steps)
        if done < rising:
            return (done + 1) / rising
        share = (done - rising) / max(1, steps - rising)
        if self.schedule == "linear":
            return 1.0 - share
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * share))
        if self.schedule == "step":
            return 0.1 ** sum(share >= mark for mark in (1 / 3, 2 / 3))
        return 1.0

    def describe(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON; when checkpoints are written does not."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["checkpoint_every_s"], values["checkpoint_every_steps"]
        if self.gradients == "sum":  # runs of before these fields go on
            del values["gradients"]
        if self.layer_decay is None:
            del values["layer_decay"]
        if self.augment is not None:
            known = dataclasses.is_dataclass(self.augment)
            values["augment"] = (
                repr(self.augment) if known else getattr(self.augment, "__qualname__", type(self.augment).__name__)
            )
        return values


@dataclass(frozen=True)
class EpochReport:
    """One pass over the data: mean loss, validation accuracy of every exit (0 to 1), training seconds and rows."""

    loss: float
    accuracy: tuple[float, ...] | None
    seconds: float
    rows: int


@dataclass(frozen=True)
class TrainReport:
    """What came of training.

    `steps` and `seconds` (training and validation together) count all of it, also what an earlier, stopped run did;
    `resumed_from` is the step at which this run took over, None when it began at the beginning.
    """

    epochs: tuple[EpochReport, ...]
    steps: int
    seconds: float
    resumed_from: int | None

    @property
    def samples_per_s(self) -> float:
        """Training rows per second of training, validation not counted."""
        spent = sum(epoch.seconds for epoch in self.epochs)
        return sum(epoch.rows for epoch in self.epochs) / spent if spent else 0.0

    @property
    def loss(self) -> float:
        """The mean loss of the last epoch."""
        return self.epochs[-1].loss

    @property
    def accuracy(self) -> tuple[float, ...] | None:
        """The validation accuracy of every exit after the last epoch, 0 to 1; None without validation."""
        return self.epochs[-1].accuracy

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {**dataclasses.asdict(self), "samples_per_s": self.samples_per_s}
