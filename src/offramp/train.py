"""One training loop for multi-exit models, which can be stopped at any moment and goes on where it was."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.artefacts import clear_partial
from offramp.checkpoints import FILE, load, model_digest, restore_optimizer, save
from offramp.data import Examples
from offramp.errors import DataError, FormatError
from offramp.learner import Learner, Phase, check_teacher, phases
from offramp.loaders import as_data, as_loader, fingerprint
from offramp.machine import fast_precision
from offramp.meter import Meter, duration
from offramp.objectives import DepthWeighted, Objective, objective_to_dict
from offramp.processes import processes
from offramp.recipe import EpochReport, Recipe, TrainReport
from offramp.record import predict
from offramp.shapes import check_labels
from offramp.teaching import own_teacher

__all__ = ["train"]

ESTIMATE_AFTER_S = 5.0


def train(
    model: nn.Module,
    data: Any,
    *,
    objective: Objective = DepthWeighted(),  # noqa: B008  frozen values
    recipe: Recipe = Recipe(),  # noqa: B008
    validation: Any = None,
    teacher: nn.Module | Tensor | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> TrainReport:
    """What came of training the model, which has learnt in place.

    Order, augmentation and dropout are functions of the recipe's seed and the step alone. So a run that was stopped,
    even by a power cut, and is called again with the same arguments ends where it would have ended. It trains where the
    model is, or on a GPU when there is one; the model comes back to its device, in its mode, with the same parameters
    trainable as before.

    Several processes that a launcher started (`accelerate launch`) train one model: each takes a part of every batch,
    gradients are added up, and the first one writes the checkpoint, in a folder that all of them see. BatchNorm sees
    each process's rows alone; its running values are averaged after every epoch.

    Args:
        model: what `attach` returned; `model(inputs)` gives logits [exit batch cls].
        data: `Examples`, a pair (inputs, labels), a torch Dataset with a length, or a DataLoader.
        objective: what to minimise, a value from `offramp.objectives`.
        recipe: how.
        validation: data on which the accuracy of every exit is reported after each epoch.
        teacher: for `Distill`: another model, or its logits [row cls] for the rows of `Examples`.
        checkpoint: a directory for the state of the run.
        resume: go on from what the directory holds; otherwise it is overwritten.
        progress: bars and a few lines on standard error.

    Raises:
        DataError: the data are empty, of no kind that can be used, without labels, or of one class only.
        ShapeError, ValueRangeError: labels do not fit the model, or the loss is no longer finite.
        FormatError: the checkpoint is damaged or belongs to another run.
        ProcessLost: another process of the run is gone.
    """
    from accelerate import Accelerator

    data = as_data(data)
    _check_rows(data, int(model.classes))  # type: ignore[arg-type]
    stages = phases(objective, recipe)
    teacher = check_teacher(teacher, model, data)
    together = processes()
    accelerator = Accelerator(cpu=together.count > 1 and not torch.cuda.is_available())
    learner = Learner(model, recipe, accelerator, teacher, _batches_per_epoch(data, recipe), together)
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None and together.first:
        clear_partial(folder / FILE, alone=True)  # one run at a time uses a folder
    identity = _identity(learner, objective, data)
    run = _Run(learner, data, None if validation is None else as_data(validation), folder, identity)
    with together.told_when_stopped(), learner.borrowed_model():
        together.agree(model)
        return run.go(stages, resume, progress and together.first)


def _identity(learner: Learner, objective: Objective, data: Any) -> dict[str, Any]:
    """By which a checkpoint is known to be of the same run."""
    return {
        "recipe": learner.recipe.describe(),
        "objective": objective_to_dict(objective),
        "model": model_digest(learner.model),
        "data": fingerprint(data),
        "teacher": type(learner.teacher).__name__,
    }


@dataclass
class _Place:
    """How far the run has come: epochs done, then batches and sums of the epoch that is under way."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss: float = 0.0
    rows: int = 0
    epoch_s: float = 0.0
    total_s: float = 0.0
    history: list[EpochReport] = field(default_factory=list)


class _Run:
    """Epochs, validation and checkpoints around a learner."""

    meter: Meter

    def __init__(self, learner: Learner, data: Any, validation: Any, folder: Path | None, identity: dict[str, Any]):
        self.learner, self.recipe = learner, learner.recipe
        self.data, self.validation, self.folder, self.identity = data, validation, folder, identity
        self.steps = learner.per_epoch * learner.recipe.epochs
        self.place = _Place()
        self.saved_at = time.perf_counter()
        self.estimated = False

    def go(self, stages: list[Phase], resume: bool, show: bool) -> TrainReport:
        """The report, after all epochs that are left."""
        learner, resumed_from = self.learner, None
        loaded = load(self.folder, learner.model, self.identity) if self.folder is not None and resume else None
        if loaded is not None:
            self.place = _Place(**{**loaded[0], "history": [_epoch(e) for e in loaded[0]["history"]]})
            resumed_from = self.place.step
        self._check_together()
        with Meter("training", total=self.steps, show=show, done=self.place.step) as self.meter:
            if resumed_from is not None:
                self.meter.line(f"resuming at step {resumed_from} of {self.steps} from {self.folder}")
            if self.recipe.precision == "bf16" and learner.device.type == "cpu" and fast_precision() != "bf16":
                self.meter.line("bf16 is emulated on this processor and much slower here: precision='fp32' is faster")
            for phase in stages:
                if self.place.epoch >= phase.last:
                    continue
                learner.enter(phase)
                begun = loaded is not None and self.place.step > learner.start
                if loaded is not None and begun:
                    restore_optimizer(learner.optimizer, loaded[1])
                loaded = None
                if phase.own_teacher and learner.teacher is None:
                    self.meter.line("the network as it is now teaches its exits from here on")
                    learner.teacher = own_teacher(
                        learner.model.backbone,  # type: ignore[arg-type]
                        self.data,
                        self.recipe,
                        self.folder,
                        resumed=begun,
                        keep=learner.together.first,
                    )
                while self.place.epoch < phase.last:
                    self._run_epoch()
        return TrainReport(tuple(self.place.history), self.place.step, self.place.total_s, resumed_from)

    def _run_epoch(self) -> None:
        """One epoch, or what is left of it."""
        place, recipe = self.place, self.recipe
        loader = as_loader(
            self.data,
            recipe.batch_size,
            shuffle=True,
            seed=recipe.seed,
            epoch=place.epoch,
            bucket=recipe.bucket,
            augment=recipe.augment,
            start=place.batch,
        )
        self.learner.train_mode()
        began = clock = time.perf_counter()
        begin = place.batch
        for batch in loader:
            place.loss += self.learner.step(batch, place.step) * len(batch.rows)
            place.rows += len(batch.rows)
            place.batch += 1
            place.step += 1
            now = time.perf_counter()
            place.epoch_s, place.total_s, clock = place.epoch_s + now - clock, place.total_s + now - clock, now
            self.meter.advance(f"epoch {place.epoch + 1}/{recipe.epochs}, loss {place.loss / place.rows:.4f}")
            if not self.estimated and now - began > ESTIMATE_AFTER_S:
                self._estimate((now - began) / (place.batch - begin))
            if place.batch < self.learner.per_epoch and self._is_due():
                self._save()
                clock = time.perf_counter()
        self.learner.together.average_buffers(self.learner.model)
        self._end_epoch()
        self._save()

    def _check_together(self) -> None:
        """Nothing, when every process goes on from the same step.

        Raises:
            FormatError: they do not; the folder is not the same for all.
        """
        steps = self.learner.together.gather(self.place.step)
        if len(set(steps)) > 1:
            raise FormatError(
                f"the processes of this run would go on from different steps ({', '.join(map(str, steps))}); expected "
                f"one folder that all of them see. {self.folder} is not, or is a leftover on some machine."
            )

    def _end_epoch(self) -> None:
        place = self.place
        began = time.perf_counter()
        accuracy = self._accuracy()
        place.total_s += time.perf_counter() - began
        report = EpochReport(place.loss / place.rows, accuracy, place.epoch_s, place.rows)
        place.history.append(report)
        place.epoch, place.batch, place.loss, place.rows, place.epoch_s = place.epoch + 1, 0, 0.0, 0, 0.0
        exits = "" if accuracy is None else ", exits " + " ".join(f"{100 * share:.1f}" for share in accuracy)
        self.meter.line(
            f"epoch {place.epoch}/{self.recipe.epochs}: loss {report.loss:.4f}{exits}, {duration(report.seconds)}"
        )

    def _accuracy(self) -> tuple[float, ...] | None:
        """The share of validation rows that each exit gets right."""
        if self.validation is None:
            return None
        recipe = self.recipe
        size = max(64, recipe.batch_size)
        logits, labels = predict(self.learner.model, self.validation, batch_size=size, precision=recipe.precision)
        if labels is None:
            raise DataError("the validation data have no labels. Give labels [row].")
        return tuple((logits.argmax(-1) == labels).double().mean(1).tolist())

    def _estimate(self, step_s: float) -> None:
        self.estimated = True
        left = self.steps - self.place.step
        self.meter.line(
            f"training on {self.learner.device}: {left} of {self.steps} steps left, about {duration(step_s * left)}"
        )

    def _is_due(self) -> bool:
        if self.folder is None or not self.learner.together.first:
            return False
        if self.recipe.checkpoint_every_steps is not None:
            return self.place.step % self.recipe.checkpoint_every_steps == 0
        return time.perf_counter() - self.saved_at > self.recipe.checkpoint_every_s

    def _save(self) -> None:
        learner = self.learner
        if self.folder is None or not learner.together.first:
            return
        # The loss of a step is that of the weights before it: without this, ruined weights could replace good ones.
        if not all(torch.isfinite(parameter).all() for parameter in learner.model.parameters()):
            raise learner.diverged("weights are NaN or infinite", self.place.step)
        save(self.folder, learner.model, learner.optimizer, self.identity, asdict(self.place))
        self.saved_at = time.perf_counter()


def _epoch(value: dict[str, Any]) -> EpochReport:
    accuracy = value["accuracy"]
    return EpochReport(**{**value, "accuracy": None if accuracy is None else tuple(accuracy)})


def _batches_per_epoch(data: Any, recipe: Recipe) -> int:
    try:
        return len(as_loader(data, recipe.batch_size))
    except TypeError:
        raise DataError(
            "the DataLoader has no length, so the number of steps is unknown. Use data with a length."
        ) from None


def _check_rows(data: Any, classes: int) -> None:
    if not isinstance(data, Examples):
        return
    if data.labels is None:
        raise DataError("the training data have no labels. Give labels [row].")
    check_labels(data.labels, len(data), classes)
    if data.labels.min() == data.labels.max():
        raise DataError(
            f"all {len(data)} training rows have label {int(data.labels[0])}. Give rows of two classes or more."
        )
