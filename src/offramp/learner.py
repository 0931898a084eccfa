"""One step of training: what learns, at which rate, from which loss."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.data import Batch, Examples, seed_for
from offramp.errors import DataError, ShapeError, ValueRangeError
from offramp.objectives import Alternating, FinalOnly, Objective, TwoStage
from offramp.processes import Processes
from offramp.recipe import Recipe
from offramp.record import to_device
from offramp.shapes import check_labels

__all__ = ["Learner", "Phase", "check_teacher", "phases"]


class Phase(NamedTuple):
    """Epochs `first` to before `last` with one objective; the part that is `frozen` learns nothing. `own_teacher` says
    that the network as it is when the phase begins is the teacher, where there is no other."""

    objective: Objective
    frozen: str | None
    first: int
    last: int
    own_teacher: bool = False


def phases(objective: Objective, recipe: Recipe) -> list[Phase]:
    """The stages of training, in order; most objectives have one.

    Raises:
        ValueRangeError: the recipe leaves a stage without epochs, or without anything to train.
    """
    if not isinstance(objective, TwoStage):
        if recipe.frozen == "backbone" and isinstance(objective, FinalOnly):
            raise ValueRangeError("FinalOnly with a frozen backbone trains nothing. Use DepthWeighted() for the heads.")
        return [Phase(objective, recipe.frozen or _idle(objective), 0, recipe.epochs)]
    if recipe.epochs < 2:
        raise ValueRangeError("TwoStage needs one epoch for each stage; Recipe.epochs is 1. Give 2 or more.")
    if recipe.frozen is not None:
        raise ValueRangeError("TwoStage says itself what its second stage freezes; set Recipe.frozen to None.")
    first = min(recipe.epochs - 1, max(1, round(objective.first_share * recipe.epochs)))
    return [
        Phase(objective.first, _idle(objective.first), 0, first),
        Phase(objective.then, "backbone" if objective.freeze else None, first, recipe.epochs, objective.teaches_itself),
    ]


class Learner:
    """A model, the optimizer of the phase it is in, and what one step needs.

    Args:
        accelerator: accelerate's, for backward, clipping and the device.
        teacher: a module, logits [row cls], or None.
        per_epoch: batches per epoch.
        together: the processes that share every batch.
    """

    optimizer: Any
    phase: Phase

    def __init__(
        self, model: nn.Module, recipe: Recipe, accelerator: Any, teacher: Any, per_epoch: int,
        together: Processes | None = None,
    ) -> None:  # fmt: skip
        self.model, self.recipe, self.accelerator, self.teacher = model, recipe, accelerator, teacher
        self.per_epoch, self.together = per_epoch, together or Processes(0, 1)
        self.classes = int(model.classes)  # type: ignore[arg-type]
        self.home = next(model.parameters()).device
        self.device: torch.device = self.home if self.home.type != "cpu" else accelerator.device

    @contextmanager
    def borrowed_model(self) -> Iterator[None]:
        """The model on the training device; afterwards on its own again, with the modes and flags that it came with.

        The caller's generators are left as they were.
        """
        modes = {module: module.training for module in self.model.modules()}
        flags = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        gradients = getattr(self.model, "gradients", "sum")
        self.model.gradients = self.recipe.gradients  # type: ignore[assignment]
        self._trainable = {parameter for parameter, flag in flags.items() if flag}
        self.model.to(self.device)
        if self.recipe.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if isinstance(self.teacher, nn.Module):
            self.teacher.to(self.device)
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                yield
        finally:
            self.model.zero_grad(set_to_none=True)
            self.model.gradients = gradients  # type: ignore[assignment]
            self.model.to(self.home)
            for module, mode in modes.items():
                module.training = mode
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            self.accelerator.free_memory()

    def enter(self, phase: Phase) -> None:
        """Nothing; the phase begins, with a fresh optimizer over what it trains."""
        recipe, self.phase = self.recipe, phase
        rates = _backbone_rates(self.model, recipe)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter in self.model.parameters():
            idle = phase.frozen == ("backbone" if parameter in rates else "heads")
            parameter.requires_grad_(parameter in self._trainable and not idle)
            if parameter.requires_grad:
                rate = rates.get(parameter, recipe.lr if recipe.head_lr is None else recipe.head_lr)
                decays = recipe.optimizer == "sgd" or parameter.ndim > 1
                groups.setdefault((rate, recipe.weight_decay if decays else 0.0), []).append(parameter)
        if not groups:
            raise ValueRangeError("no parameter is left to train. Unfreeze some, or change Recipe.frozen.")
        made = [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]
        self.optimizer = self.accelerator.prepare(self._optimizer(made))
        self._peaks = [rate for rate, _ in groups]

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        recipe = self.recipe
        if recipe.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
        fused = self.device.type in ("cpu", "cuda", "mps", "xpu")
        return torch.optim.AdamW(groups, lr=recipe.lr, fused=fused)

    def train_mode(self) -> None:
        """Nothing; the model is in train mode, a frozen backbone in eval mode, BatchNorm included."""
        self.model.train()
        if self.phase.frozen == "backbone":
            self.model.backbone.eval()  # type: ignore[union-attr,operator]

    @property
    def start(self) -> int:
        """The step at which the phase begins."""
        return self.phase.first * self.per_epoch

    def step(self, batch: Batch, number: int) -> float:
        """The loss of one batch at step `number` of the run, after one step of the optimizer. Several processes take a
        part of the rows each; the loss is that of the whole batch.

        Raises:
            ValueRangeError: the loss or the gradient is not finite; the weights are as before the step.
        """
        steps = self.phase.last * self.per_epoch - self.start
        factor = self.recipe.rate(number - self.start, steps)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        batch, share = self.together.share(batch)
        labels = self._labels(batch)
        # Dropout is a function of the step, so that going on needs no state of generators.
        torch.manual_seed(seed_for(self.recipe.seed, number, 1 + self.together.rank))
        inputs = to_device(batch.inputs, self.device, self.recipe.channels_last)
        objective = self.phase.objective
        if isinstance(objective, Alternating):
            objective = objective.at(number - self.start)
        logits, taught = self._forward(inputs, batch, isinstance(objective, FinalOnly))
        loss = objective(logits, labels, progress=(number - self.start) / steps, teacher=taught)
        value = self._over_all(loss.item() * share)
        if not math.isfinite(value):
            raise self.diverged(f"the loss is {value}", number, batch)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss if share == 1.0 else loss * share)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.together.add_up([p.grad for p in parameters if p.grad is not None])
        if self.recipe.clip_norm is not None:
            norm = self.accelerator.clip_grad_norm_(parameters, self.recipe.clip_norm)
            if norm is not None and not torch.isfinite(norm):
                raise self.diverged(f"the norm of the gradient is {float(norm)}", number, batch)
        self.optimizer.step()
        return value

    def _over_all(self, value: float) -> float:
        """The sum of every process's value."""
        if self.together.count == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64, device=self.device)
        self.together.add_up([held])
        return float(held)

    def _forward(self, inputs: Any, batch: Batch, alone: bool) -> tuple[Tensor, Tensor | None]:
        """Float32 logits [exit batch cls] of the model, or of the last exit if that is `alone` in the loss; and
        [batch cls] of the teacher if there is one."""
        alone = alone and hasattr(self.model, "plain")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            logits = self.model.plain(inputs).unsqueeze(0) if alone else self.model(inputs)  # type: ignore[operator]
            taught = None if alone else self._taught(inputs, batch)
        if logits.ndim != 3 or logits.shape[-1] != self.classes:
            raise ShapeError(f"the model gave shape {list(logits.shape)}; expected [exit batch {self.classes}].")
        if taught is not None and taught.shape != logits.shape[1:]:
            raise ShapeError(f"the teacher gave shape {list(taught.shape)}; expected {list(logits.shape[1:])}.")
        return logits.float(), None if taught is None else taught.float()

    def _labels(self, batch: Batch) -> Tensor:
        """Class indices [batch], or smoothed distributions [batch cls]."""
        if batch.labels is None:
            raise DataError("the training data have no labels. Give labels [row], or the key 'labels' in every row.")
        labels, count = batch.labels, len(batch.rows)
        if getattr(self.model, "per_token", False):  # it leaves out places without a token, row after row
            labels = labels[labels >= 0]
            count = len(labels)
        labels = check_labels(labels, count, self.classes).to(self.device)
        share = self.recipe.label_smoothing
        return F.one_hot(labels, self.classes).float() * (1 - share) + share / self.classes if share else labels

    def _taught(self, inputs: Any, batch: Batch) -> Tensor | None:
        if self.teacher is None:
            return None
        if isinstance(self.teacher, Tensor):
            return self.teacher[batch.rows].to(self.device)
        with torch.no_grad():
            if isinstance(inputs, dict) and not hasattr(self.teacher, "exits"):
                said = self.teacher.eval()(**inputs)
            else:
                said = self.teacher.eval()(inputs)
        said = getattr(said, "logits", said)
        return said[-1] if said.ndim == 3 else said  # type: ignore[no-any-return]

    def diverged(self, what: str, number: int, batch: Batch | None = None) -> ValueRangeError:
        """The error to raise when numbers ran away at a step; it names bad inputs when they are the cause."""
        inputs = [] if batch is None else [batch.inputs] if isinstance(batch.inputs, Tensor) else batch.inputs.values()
        where = f"step {number} (epoch {number // self.per_epoch + 1})"
        if any(t.is_floating_point() and not torch.isfinite(t).all() for t in inputs):
            return ValueRangeError(f"the inputs of {where} have values that are NaN or infinite. Remove those rows.")
        return ValueRangeError(
            f"{what} at {where}; expected a finite number. Lower Recipe.lr (now {self.recipe.lr:g}), lengthen the "
            "warm-up, or set clip_norm=1.0. A checkpoint, if there is one, is from before and is kept."
        )


def check_teacher(teacher: Any, model: nn.Module, data: Any) -> Any:
    """The teacher, when it can teach this model on these data.

    Raises:
        ShapeError: its logits are not one row per row of `Examples`.
        ValueRangeError: it is the model itself.
    """
    if teacher is not None and (teacher is model or teacher is model.backbone):
        raise ValueRangeError("the teacher is the model that learns. Give a copy: copy.deepcopy(model.backbone).")
    if not isinstance(teacher, Tensor):
        return teacher
    if not isinstance(data, Examples) or teacher.shape != (len(data), model.classes):
        rows = len(data) if isinstance(data, Examples) else "rows"
        raise ShapeError(
            f"teacher logits have shape {list(teacher.shape)}; expected [{rows}, {model.classes}], a row for "
            "each row of Examples. For other data, give the teacher as a model."
        )
    return teacher


def _backbone_rates(model: nn.Module, recipe: Recipe) -> dict[nn.Parameter, float]:
    """The highest learning rate of every parameter of the backbone: less for parts before earlier taps, if asked.

    A parameter belongs to the part before the first tapped module that does not come before it in the model's order.
    """
    backbone: Any = model.backbone
    if recipe.layer_decay is None:
        return dict.fromkeys(backbone.parameters(), recipe.lr)
    names = [name for name, _ in backbone.named_parameters()]
    ends = []
    for tap in getattr(model, "taps", ()):
        path = tap.rpartition("@")[0] or tap
        ends.append(max((i for i, name in enumerate(names) if name.startswith(f"{path}.")), default=-1))
    rates = {}
    for i, parameter in enumerate(backbone.parameters()):
        later = sum(end >= i for end in ends)
        rates[parameter] = recipe.lr * recipe.layer_decay**later
    return rates


def _idle(objective: Objective) -> str | None:
    """Heads get no gradient from FinalOnly: left to the optimizer, weight decay would still shrink them."""
    return "heads" if isinstance(objective, FinalOnly) else None
