"""What training minimises: values that turn the logits of all exits into one number."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from offramp.errors import FormatError, OfframpError, ShapeError, ValueRangeError

__all__ = [
    "Alternating",
    "DepthWeighted",
    "Distill",
    "EENetLoss",
    "FinalOnly",
    "Objective",
    "SelfDistill",
    "TwoStage",
    "Uniform",
    "Weighted",
    "objective_from_dict",
    "objective_to_dict",
]

Logits = Float[Tensor, "exit batch cls"]
Labels = Int[Tensor, "batch"] | Float[Tensor, "batch cls"]
Teacher = Float[Tensor, "batch cls"] | None
Loss = Float[Tensor, ""]
VERSION = 1


@runtime_checkable
class Objective(Protocol):
    """What training minimises. Implementations are frozen dataclasses.

    `labels` are class indices, or one distribution per row (smoothed labels). `progress` runs from 0 to 1 over
    training. `teacher` holds the logits of another model for the same rows, when training was given one.
    """

    def __call__(self, logits: Logits, labels: Labels, *, progress: float, teacher: Teacher = None) -> Loss:
        """The loss of one batch: a float scalar, the mean over its rows."""
        ...


@dataclass(frozen=True)
class DepthWeighted:
    """Cross-entropy weighted by depth: sum_i i CE_i / sum_i i, with i = 1..E.

    Source: PABEE (Zhou et al. 2020), equation 4, and BEEM's released classification code. Same formula.
    """

    def __call__(self, logits: Logits, labels: Labels, *, progress: float = 0.0, teacher: Teacher = None) -> Loss:
        """The loss of one batch."""
        return (_depth(logits) * _cross_entropies(logits, labels)).sum()


@dataclass(frozen=True)
class Uniform:
    """The mean cross-entropy over exits, so that every exit counts the same.

    Source: MSDNet (Huang et al. 2018), section 4, which sums over exits; ours divides by their number, so that the
    learning rate does not depend on it.
    """

    def __call__(self, logits: Logits, labels: Labels, *, progress: float = 0.0, teacher: Teacher = None) -> Loss:
        """The loss of one batch."""
        return _cross_entropies(logits, labels).mean()


@dataclass(frozen=True)
class Weighted:
    """Cross-entropy with a weight of its own for every exit: sum_k w_k CE_k / sum_k w_k.

    Args:
        weights: one per exit, not negative. The shares of rows that leave at each exit under a budget make training
            look at what that budget uses.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", _weights(self.weights, type(self).__name__))

    def __call__(self, logits: Logits, labels: Labels, *, progress: float = 0.0, teacher: Teacher = None) -> Loss:
        """The loss of one batch.

        Raises:
            ShapeError: there are more or fewer exits than weights.
        """
        return (_shares(self.weights, logits) * _cross_entropies(logits, labels)).sum()


@dataclass(frozen=True)
class EENetLoss:
    """sum_k (k+1) CE_k / (E (E+1)); in the last part of training plus alpha T^2 sum_{k<E-1} KL(last || exit k).

    Both distributions are softened by the temperature T. The first term is half of DepthWeighted, as released.

    Source: EENet (Ilhan et al. 2024), released training code: T = 3, alpha = 0.01, last quarter. Ours differs: the
    divergence is the mean over rows (released: over rows and classes, so smaller by the number of classes), and the
    last exit is a fixed target (released: it is also pulled towards the earlier exits).
    """

    alpha: float = 0.01
    temperature: float = 3.0
    distill_from: float = 0.75

    def __post_init__(self) -> None:
        _number(self, "alpha", 0.0, math.inf)
        _number(self, "temperature", 0.0, math.inf, open_low=True)
        _number(self, "distill_from", 0.0, 1.0)

    def __call__(self, logits: Logits, labels: Labels, *, progress: float = 0.0, teacher: Teacher = None) -> Loss:
        """The loss of one batch."""
        loss = 0.5 * (_depth(logits) * _cross_entropies(logits, labels)).sum()
        if progress < self.distill_from or logits.shape[0] == 1:
            return loss
        return loss + self.alpha * _divergences(logits[:-1], logits[-1].detach(), self.temperature).sum()


@dataclass(frozen=True)
class SelfDistill:
    """Weighted alpha CE_k + (1-alpha) T^2 KL(last || exit k); the last exit itself has CE alone.

    The last exit is a fixed target: no gradient flows into it from the exits that learn from it.

    Args:
        alpha: the share of the labels.
        temperature: T, which softens both distributions.
        weights: of the exits: "depth" (1 to E), "uniform", or one number per exit.

    Source: Phuong and Lampert (ICCV 2019), section 3, with the last exit as the teacher; the depth weights are ours.
    """

    alpha: float = 0.5
    temperature: float = 2.0
    weights: tuple[float, ...] | str = "depth"

    def __post_init__(self) -> None:
        _number(self, "alpha", 0.0, 1.0)
        _number(self, "temperature", 0.0, math.inf, open_low=True)
        object.__setattr__(self, "weights", _weights(self.weights, type(self).__name__))

    def __call__(self, logits: Logits, labels: Labels, *, progress: float = 0.0, teacher: Teacher = None) -> Loss:
        """The loss of one batch."""
        ce = _cross_entropies(logits, labels)
        kl = _divergences(logits[:-1], logits[-1].detach(), self.temperature)
        per_exit = torch.cat([self.alpha * ce[:-1] + (1 - self.alpha) * kl, ce[-1:]])
        return (_shares(self.weights, logits) * per_exit).sum()


@dataclass(frozen=True)
class Distill:
    """Weighted alpha CE_k + (1-alpha) T^2 KL(teacher || exit k), for every exit; needs `train(teacher=...)`.

    Args:
        alpha: the share of the labels.
        temperature: T, which softens both distributions.
        weights: of the exits: "depth" (1 to E), "uniform", or one number per exit.

    Source: Hinton et al. (2015), section 2, applied to every exit; the depth weights are PABEE's. The defaults are the
    ones that served a network started from its own plain fine-tuned version, which is then the teacher.
    """

    alpha: float = 0.3
    temperature: float = 2.0
    weights: tuple[float, ...] | str = "depth"

    def __post_init__(self) -> None:
        _number(self, "alpha", 0.0, 1.0)
        _number(self, "temperature", 0.0, math.inf, open_low=True)
        object.__setattr__(self, "weights", _weights(self.weights, type(self).__name__))

    def __call__(self, logits: Logits, labels: Labels, *, progress: float = 0.0, teacher: Teacher = None) -> Loss:
        """The loss of one batch.

        Raises:
            ValueRangeError: there is no teacher.
        """
        if teacher is None:
            raise ValueRangeError("Distill has no teacher. Pass train(teacher=model or logits), or use SelfDistill.")
        kl = _divergences(logits, teacher.detach(), self.temperature)
        per_exit = self.alpha * _cross_entropies(logits, labels) + (1 - self.alpha) * kl
        return (_shares(self.weights, logits) * per_exit).sum()


@dataclass(frozen=True)
class FinalOnly:
    """The cross-entropy of the last exit. Only the original model learns; the heads in between stay as they are."""

    def __call__(self, logits: Logits, labels: Labels, *, progress: float = 0.0, teacher: Teacher = None) -> Loss:
        """The loss of one batch."""
        return _cross_entropies(logits[-1:], labels)[0]


@dataclass(frozen=True)
class Alternating:
    """Two objectives in turns: `first` at even steps, `then` at odd ones; both train everything that learns.

    Source: BERxiT (Xin et al. 2021), section 3.2: the last exit alone, and all exits, in turns. Ours weighs exits by
    depth where theirs adds them up.
    """

    first: Objective = FinalOnly()
    then: Objective = DepthWeighted()

    def __post_init__(self) -> None:
        for name in ("first", "then"):
            value = getattr(self, name)
            if not isinstance(value, Objective) or isinstance(value, TwoStage | Alternating):
                raise ValueRangeError(
                    f"Alternating.{name} is {value!r}; expected an objective that is one and the same."
                )
        if isinstance(self.then, FinalOnly):
            raise ValueRangeError(
                "Alternating.then is FinalOnly(), which trains no head; expected DepthWeighted() or such."
            )

    def at(self, step: int) -> Objective:
        """The objective of a step, counted from 0."""
        return self.then if step % 2 else self.first

    def __call__(self, logits: Logits, labels: Labels, *, progress: float = 0.0, teacher: Teacher = None) -> Loss:
        """The mean of both losses: what two steps minimise."""
        losses = [each(logits, labels, progress=progress, teacher=teacher) for each in (self.first, self.then)]
        return 0.5 * (losses[0] + losses[1])


@dataclass(frozen=True)
class TwoStage:
    """First one objective on everything, then another: on the heads alone, with the backbone frozen in eval mode,
    unless `freeze` is False.

    `first_share` of the epochs (rounded, at least one for each stage) go to the first. Each stage has a fresh optimizer
    and its own run through the learning-rate schedule, and sees `progress` from 0 to 1.

    Args:
        first, then: the objectives.
        first_share: of the epochs, above 0 and below 1.
        freeze: False lets everything go on learning in the second stage. A `Distill` there that has no teacher is then
            taught by the network as the first stage left it.

    Source: BEEM's released captioning code (fine-tune the backbone, freeze it, train the heads); DeeBERT (Xin et al.
    2020), section 3.2, trains classification exits so. Being taught by one's own plain version is ours.
    """

    first: Objective = FinalOnly()
    then: Objective = DepthWeighted()
    first_share: float = 0.5
    freeze: bool = True

    def __post_init__(self) -> None:
        for name in ("first", "then"):
            value = getattr(self, name)
            if not isinstance(value, Objective) or isinstance(value, TwoStage):
                raise ValueRangeError(f"TwoStage.{name} is {value!r}; expected an objective that has one stage.")
        if isinstance(self.then, FinalOnly):
            raise ValueRangeError(
                "TwoStage.then is FinalOnly(), which trains no head; expected DepthWeighted() or such."
            )
        _number(self, "first_share", 0.0, 1.0, open_low=True)
        if self.first_share == 1.0:
            raise ValueRangeError(
                "TwoStage.first_share is 1.0, which leaves nothing for the heads; expected less than 1."
            )
        if not isinstance(self.freeze, bool):
            raise ValueRangeError(f"TwoStage.freeze is {self.freeze!r}; expected True or False.")

    @property
    def teaches_itself(self) -> bool:
        """Whether the second stage is taught by what the first one made, where no other teacher is given."""
        return not self.freeze and isinstance(self.then, Distill)

    def __call__(self, logits: Logits, labels: Labels, *, progress: float = 0.0, teacher: Teacher = None) -> Loss:
        """The loss of one batch: the first objective's before `first_share`, the other's from there on."""
        if progress < self.first_share:
            return self.first(logits, labels, progress=progress / self.first_share, teacher=teacher)
        rest = (progress - self.first_share) / (1 - self.first_share)
        return self.then(logits, labels, progress=rest, teacher=teacher)


KINDS: dict[str, type] = {
    cls.__name__: cls
    for cls in (DepthWeighted, Uniform, Weighted, EENetLoss, SelfDistill, Distill, FinalOnly, Alternating, TwoStage)
}


def objective_to_dict(objective: Objective) -> dict[str, Any]:
    """The objective as a JSON object: kind, version and its fields."""
    values = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}  # type: ignore[arg-type]
    fields = {k: objective_to_dict(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()}  # type: ignore[arg-type]
    return {"kind": type(objective).__name__, "version": VERSION, "fields": fields}


def objective_from_dict(value: Any) -> Objective:
    """The objective that `objective_to_dict` described.

    Raises:
        FormatError: the object is not an objective's, is from a newer version, or has fields that are unknown or wrong.
    """
    if not isinstance(value, dict) or set(value) != {"kind", "version", "fields"}:
        raise FormatError("not an objective: expected an object with exactly the keys kind, version and fields.")
    kind, version, fields = value["kind"], value["version"], value["fields"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise FormatError(f"unknown objective kind {kind!r}; expected one of {', '.join(KINDS)}.")
    if version != VERSION:
        raise FormatError(f"objective version {version!r}; this Offramp reads version {VERSION}. Update Offramp.")
    known = {f.name for f in dataclasses.fields(KINDS[kind])}
    if not isinstance(fields, dict) or set(fields) - known:
        raise FormatError(f"{kind} has the fields {sorted(known)}; got {fields!r}. Correct the file.")
    try:
        made = KINDS[kind](**{k: _field(v) for k, v in fields.items()})
    except (TypeError, OfframpError) as error:
        raise FormatError(f"{kind} cannot be made from these fields: {error}") from None
    return made  # type: ignore[no-any-return]


def _field(value: Any) -> Any:
    """A field as it was before it became JSON."""
    if isinstance(value, dict):
        return objective_from_dict(value)
    return tuple(value) if isinstance(value, list) else value


def _weights(given: Any, kind: str) -> tuple[float, ...] | str:
    """One weight per exit, or a word for them.

    Raises:
        ValueRangeError: it is neither, or the weights are negative or all nothing.
    """
    if given in ("depth", "uniform") and kind != "Weighted":
        return str(given)
    numbers = isinstance(given, tuple | list) and all(
        isinstance(w, int | float) and not isinstance(w, bool) and math.isfinite(w) and w >= 0 for w in given
    )
    if not numbers or sum(given) <= 0:
        words = "" if kind == "Weighted" else "'depth', 'uniform', or "
        raise ValueRangeError(
            f"{kind}.weights is {given!r}; expected {words}a number for each exit, none negative and one above 0."
        )
    return tuple(map(float, given))


def _shares(weights: tuple[float, ...] | str, logits: Logits) -> Float[Tensor, "exit"]:
    """The weights of the exits, which sum to one.

    Raises:
        ShapeError: there are more or fewer exits than weights.
    """
    if weights == "depth":
        return _depth(logits)
    exits = logits.shape[0]
    given = torch.ones(exits) if isinstance(weights, str) else torch.tensor(weights)
    if len(given) != exits:
        raise ShapeError(f"there are {len(given)} weights for {exits} exits; expected one for each exit.")
    return (given / given.sum()).to(logits.device)


def _depth(logits: Logits) -> Float[Tensor, "exit"]:
    weights = torch.arange(1, logits.shape[0] + 1, dtype=torch.float32, device=logits.device)
    return weights / weights.sum()


def _cross_entropies(logits: Logits, labels: Labels) -> Float[Tensor, "exit"]:
    if labels.shape[0] != logits.shape[1]:
        raise ShapeError(f"there are {labels.shape[0]} labels for logits of {logits.shape[1]} rows; expected as many.")
    exits, batch, classes = logits.shape
    repeated = labels.repeat(exits, *[1] * (labels.ndim - 1))
    rows = F.cross_entropy(logits.float().reshape(exits * batch, classes), repeated, reduction="none")
    return rows.reshape(exits, batch).mean(dim=1)


def _divergences(logits: Logits, target: Float[Tensor, "batch cls"], temperature: float) -> Float[Tensor, "exit"]:
    """T^2 KL(target || exit), mean over rows, of the softened distributions."""
    ours = F.log_softmax(logits.float() / temperature, dim=-1)
    theirs = F.log_softmax(target.float() / temperature, dim=-1).expand_as(ours)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean(1) * temperature**2


def _number(value: Any, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    got = getattr(value, name)
    right = isinstance(got, int | float) and not isinstance(got, bool) and math.isfinite(got)
    if not right or not low <= got <= high or (open_low and got == low):
        interval = f"{'above' if open_low else 'at least'} {low:g}" + (f", at most {high:g}" if high < math.inf else "")
        raise ValueRangeError(f"{type(value).__name__}.{name} is {got!r}; expected a finite number {interval}.")
    object.__setattr__(value, name, float(got))
