"""`attach`: a model with exits from any model, by the names of its modules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp.errors import ShapeError, ValueRangeError
from offramp.graph import Dynamic, eval_mode, own_precision
from offramp.heads import Wanted, build_heads
from offramp.inputs import Inputs, batch_size, mask_of, names_of, tensors_of
from offramp.model import MultiExitModel
from offramp.taps import Tap, find_taps, listen, logits_of

__all__ = ["attach"]


def attach(
    model: nn.Module,
    at: str | Sequence[str],
    head: Wanted | Sequence[Wanted] = "auto",
    *,
    example: Inputs,
    classes: int | None = None,
    dynamic: Dynamic | Sequence[int] | None = None,
    stages: Sequence[nn.Module] | None = None,
) -> MultiExitModel:
    """The model with an exit behind each tapped module; the model itself is kept, shared and not changed.

        model = attach(resnet, at=("layer1", "layer2"), head="auto", example=images[:1])
        model(images)            # [exit batch cls]

    Args:
        model: any module that gives logits [batch cls], or an object or mapping with `logits`.
        at: names of modules, as in `model.named_modules()`. A module that is called several times in one forward needs
            the call's number, from 0: "encoder.layer@2". Exits come in the order of execution, whatever the order here.
        head: "auto", a short name ("map", "conv", "first", "mean", "projected", "attention", "pooler", "vector"), a
            spec such as `MapHead(convs=3, divide=4)`, a callable (shape, classes) -> module, or a list with one of
            these or a module for each name in `at`. Heads start where the model is, in its dtype.
        example: inputs to run the model on, one row or more; kept, to cut the stages.
        classes: checked against the model's output when given.
        dynamic: the axes, besides the rows, whose length varies from call to call: {"input_ids": (1,)}, or (1,) for a
            single tensor. By default axis 1 of integer inputs [batch tok].
        stages: E modules to use as stages instead of cutting the model: stage k goes from tap k-1 to tap k.

    Raises:
        NoSuchModule: a name is not a module; the message gives the nearest names.
        ValueRangeError: a tap is named twice, never called, called several times, or is the model's own output.
        ShapeError: the output is not [batch cls], or a tap has no rows, or does not fit its head.
    """
    taps = find_taps(model, (at,) if isinstance(at, str) else tuple(at))
    example = _kept(example)
    rows = batch_size(example)
    probe = _probe(model, taps, example)
    logits = _checked_logits(probe.logits, rows, type(model).__name__)
    if classes not in (None, logits.shape[1]):
        raise ShapeError(f"{type(model).__name__} gives {logits.shape[1]} classes; expected classes={classes}.")
    _check_taps(taps, probe, rows, logits)
    shapes = [tuple(probe.tensors[k].shape) for k in range(len(taps))]
    heads = build_heads(head, shapes, logits.shape[1], model)
    for k, module in enumerate(heads):
        module.to(device=probe.tensors[k].device, dtype=probe.tensors[k].dtype)
    order = sorted(range(len(taps)), key=lambda k: probe.order[k])
    built = MultiExitModel(
        model,
        [heads[k] for k in order],
        [taps[k] for k in order],
        logits.shape[1],
        example,
        dynamic=_dynamic(dynamic, example),
        stages=stages,
        overwritten=[probe.overwritten[k] for k in order],
    )
    built.training = model.training
    built.heads.train(model.training)
    _check_heads(built, [probe.tensors[k] for k in order], mask_of(example), rows)
    return built


@dataclass(frozen=True)
class _Probe:
    """What one forward on the example shows: logits, taps, the place of each in the order, and who writes into them."""

    logits: Tensor
    tensors: dict[int, Tensor]
    order: dict[int, int]
    overwritten: dict[int, bool]
    same: dict[int, int]
    calls: dict[str, int]


def _kept(example: Inputs) -> Inputs:
    if isinstance(example, Tensor):
        return example.detach().clone()
    if not isinstance(example, Mapping) or not all(isinstance(value, Tensor) for value in example.values()):
        raise ShapeError(f"example= is {type(example).__name__}; expected a tensor, or tensors by name.")
    return {name: tensor.detach().clone() for name, tensor in example.items()}


def _probe(model: nn.Module, taps: Sequence[Tap], example: Inputs) -> _Probe:
    heard: dict[int, Tensor] = {}
    copies: dict[int, Tensor] = {}
    versions: dict[int, int] = {}

    def hear(k: int, tap: Tensor) -> None:
        heard[k], copies[k], versions[k] = tap, tap.clone(), tap._version

    device = tensors_of(example)[0].device
    # inference tensors count no versions, so a caller's inference mode is left for this one forward
    with torch.inference_mode(False), torch.no_grad(), own_precision(device), eval_mode(model):
        with listen(model, taps, hear) as calls:
            output = model(example) if isinstance(example, Tensor) else model(**example)
        logits = logits_of(output, model)
    places = {id(tensor): k for k, tensor in reversed(heard.items())}
    return _Probe(
        logits,
        copies,
        {k: place for place, k in enumerate(heard)},
        {k: tensor._version != versions[k] for k, tensor in heard.items()},
        {k: -1 if tensor is logits else places[id(tensor)] for k, tensor in heard.items()},
        dict(calls),
    )


def _check_taps(taps: Sequence[Tap], probe: _Probe, rows: int, logits: Tensor) -> None:
    for k, tap in enumerate(taps):
        calls = probe.calls[tap.path]
        if k not in probe.tensors:
            what = f"is called {calls} times" if calls else "is never called"
            raise ValueRangeError(
                f"Tap {tap.name!r} is not reached: module {tap.path!r} {what} in a forward on the example. "
                "Name a call from 0, or tap a module that the forward calls."
            )
        if calls > 1 and "@" not in tap.name:
            raise ValueRangeError(
                f"Module {tap.name!r} is called {calls} times in one forward, so its name alone is not one place. "
                f"Name the call, '{tap.name}@0' to '{tap.name}@{calls - 1}'."
            )
        if probe.same[k] == -1:
            raise ValueRangeError(f"Tap {tap.name!r} is the model's own output, which is the last exit already.")
        if probe.same[k] != k:
            other = taps[probe.same[k]].name
            raise ValueRangeError(f"Taps {other!r} and {tap.name!r} are the same tensor; expected one of them.")
        shape = probe.tensors[k].shape
        if len(shape) < 2 or shape[0] != rows or not probe.tensors[k].is_floating_point():
            raise ShapeError(
                f"Tap {tap.name!r} is {probe.tensors[k].dtype} of shape {list(shape)} for {rows} rows; expected "
                "floating point [batch ...], rows first. Tap another module."
            )


def _dynamic(dynamic: Dynamic | Sequence[int] | None, example: Inputs) -> Dynamic | None:
    if dynamic is None:
        return None
    names, tensors = names_of(example), tensors_of(example)
    found = dict(dynamic) if isinstance(dynamic, Mapping) else {names[0]: tuple(dynamic)}
    for name, axes in found.items():
        ndim = tensors[names.index(name)].ndim if name in names else 0
        if not all(0 <= axis < ndim for axis in axes) or (not isinstance(dynamic, Mapping) and len(names) > 1):
            raise ValueRangeError(
                f"dynamic={dynamic!r} does not fit the inputs {list(names)}; "
                "expected {name: (axis, ...)} with axes from 0."
            )
    return {name: tuple(axes) for name, axes in found.items()}


def _check_heads(model: MultiExitModel, taps: Sequence[Tensor], mask: Tensor | None, rows: int) -> None:
    with torch.no_grad(), own_precision(taps[0].device), eval_mode(model):
        for k, tap in enumerate(taps):
            logits = _checked_logits(model.head_logits(k, tap, mask), rows, f"The head at {model.taps[k]!r}")
            if logits.shape[1] != model.classes:
                raise ShapeError(
                    f"The head at {model.taps[k]!r} gives {logits.shape[1]} classes; expected {model.classes}."
                )


def _checked_logits(logits: Tensor, rows: int, what: str) -> Tensor:
    """The logits, when they are floating point [batch cls] with one row per input row."""
    if logits.ndim != 2 or logits.shape[0] != rows or not logits.is_floating_point():
        raise ShapeError(
            f"{what} gives {logits.dtype} of shape {list(logits.shape)} for {rows} rows; expected floating point "
            f"logits [batch cls] = [{rows}, classes]. Put a module around it that returns them."
        )
    if logits.shape[1] < 2:
        raise ShapeError(f"{what} gives 1 output a row; exits of this version need 2 classes or more.")
    return logits
