"""Recording what every exit says about every row of a data set."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from offramp.data import Examples
from offramp.errors import DataError, ShapeError, ValueRangeError
from offramp.loaders import as_data, as_loader
from offramp.meter import Meter
from offramp.processes import processes
from offramp.trace import ExitTrace
from offramp.units import precision_of

__all__ = ["Says", "predict", "record", "to_device"]


@runtime_checkable
class Says(Protocol):
    """What says the logits of every exit in its own arithmetic, such as an engine."""

    @property
    def model(self) -> nn.Module:
        """Whose logits they are."""
        ...

    @property
    def precision(self) -> str:
        """Of its arithmetic."""
        ...

    def says(self, inputs: Any) -> tuple[Tensor, Tensor | None]:
        """(the logits [exit batch cls], the signals [exit batch sig] or None)."""
        ...


def record(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 64,
    ids: Sequence[Any] | None = None,
    progress: bool = True,
    precision: str = "fp32",
    engine: Says | None = None,
) -> ExitTrace:
    """The trace of a model over a data set: logits [exit row cls] and labels [row], rows in the data's order; and the
    signals [exit row sig] of a model that has some.

    The model runs in eval mode, where it is, and comes back in the mode it was in. Several processes that a launcher
    started (`accelerate launch`) take a part of the rows each, and every one of them gets the whole trace; a DataLoader
    is read by each of them as a whole.

    Args:
        data: `Examples`, a pair (inputs, labels), a torch Dataset with a length, or a DataLoader.
        ids: what names every row; None takes the numbers of `Examples`, and counts the rows of other data.
        precision: "fp32", or "bf16" for autocast; logits are kept as float32 either way.
        engine: what says the logits instead of the model's own forward: from `engine(model, ...)`. A policy for that
            engine in another precision is calibrated on its own logits.

    Raises:
        DataError: the data are empty or of no kind that can be used.
        ShapeError, ValueRangeError: labels do not fit the model, or logits are NaN or infinite; the engine was made for
            another model, or `precision` is given beside it.
    """
    if engine is not None and (engine.model is not model or precision != "fp32"):
        raise ValueRangeError(
            "the engine was made for another model, or precision= is given beside it; give record the model that the "
            "engine was made for, and no precision: the engine has its own."
        )
    data = as_data(data)
    logits, signals, labels = _said(model, data, batch_size, progress, precision, engine)
    if ids is None:
        ids = data.ids.tolist() if isinstance(data, Examples) else range(logits.shape[1])
    names: Any = () if signals is None else model.signals
    return ExitTrace(
        logits=logits, labels=labels, signals=signals, signal_names=names, ids=tuple(str(name) for name in ids),
        precision=engine.precision if engine is not None else precision if precision != "fp32" else precision_of(model),
    )  # fmt: skip


def predict(
    model: nn.Module, data: Any, *, batch_size: int = 64, progress: bool = False, precision: str = "fp32"
) -> tuple[Float[Tensor, "exit row cls"], Int[Tensor, "row"] | None]:
    """The logits of every exit and the labels (None when the data have none), on the CPU, rows in the data's order.

    Raises:
        DataError: the data are empty or of no kind that can be used.
        ShapeError: the model's output is not [exit batch cls].
        ValueRangeError: `precision` is neither "fp32" nor "bf16".
    """
    logits, _, labels = _said(model, data, batch_size, progress, precision)
    return logits, labels


Said = tuple[Float[Tensor, "exit row cls"], Float[Tensor, "exit row sig"] | None, Int[Tensor, "row"] | None]


def _said(model: Any, data: Any, batch_size: int, progress: bool, precision: str, engine: Says | None = None) -> Said:
    """(logits, signals or None, labels or None) on the CPU, rows in the data's order; of all processes' parts."""
    together = processes()
    if together.count == 1 or isinstance(data, DataLoader):
        return _said_here(model, data, batch_size, progress, precision, engine)
    mine, said = together.part_of(len(data)), None
    if len(mine):
        part = data.select(list(mine)) if isinstance(data, Examples) else Subset(data, mine)
        said = _said_here(model, part, batch_size, progress and together.first, precision, engine)
    found = [each for each in together.gather(said) if each is not None]
    logits, signals, labels = zip(*found, strict=True)
    return (
        torch.cat(logits, 1),
        None if signals[0] is None else torch.cat(signals, 1),
        None if labels[0] is None else torch.cat(labels),
    )


def _said_here(model: Any, data: Any, batch_size: int, progress: bool, precision: str, engine: Says | None) -> Said:
    """What this process finds about these rows."""
    if precision not in ("fp32", "bf16"):
        raise ValueRangeError(f"precision is {precision!r}; expected 'fp32' or 'bf16'.")
    loader = as_loader(data, batch_size, bucket=True)
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    pieces: list[Tensor] = []
    beside: list[Tensor] = []
    rows: list[Tensor] = []
    labels: list[Tensor | None] = []
    model.eval()
    try:
        with Meter("recording", total=_length(loader), show=progress) as meter, torch.inference_mode():
            for batch in loader:
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    inputs = to_device(batch.inputs, device)
                    logits, signals = _of_batch(model, inputs) if engine is None else engine.says(inputs)
                if logits.ndim != 3:
                    raise ShapeError(
                        f"the model gave shape {list(logits.shape)}; expected [exit batch cls]. Use attach()."
                    )
                pieces.append(logits.float().cpu())
                if signals is not None:
                    beside.append(signals.cpu())
                rows.append(batch.rows)
                labels.append(batch.labels)
                meter.advance()
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not pieces:
        raise DataError("the data set is empty. Give at least one row.")
    place = torch.cat(rows)
    whole, told = _in_order(pieces, place), _in_order(beside, place) if beside else None
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
        return whole, told, None
    answers = torch.empty(len(place), dtype=known[0].dtype)
    answers[place] = torch.cat(known).cpu()
    return whole, told, answers


def _of_batch(model: Any, inputs: Any) -> tuple[Tensor, Tensor | None]:
    """(logits, signals or None) of one batch; a model without signals is called as any module."""
    return model.forward_with_signals(inputs) if getattr(model, "signals", ()) else (model(inputs), None)


def _in_order(pieces: list[Tensor], place: Tensor) -> Tensor:
    """The pieces [exit batch ...] as one [exit row ...], each row at its place."""
    # Filled outside inference mode, so that the trace can take part in autograd when a policy is fitted.
    whole = torch.empty((pieces[0].shape[0], len(place), pieces[0].shape[2]))
    whole[:, place] = torch.cat(pieces, dim=1)
    return whole


def to_device(inputs: Any, device: torch.device, channels_last: bool = False) -> Any:
    """The inputs on the device; images with their channels innermost if asked."""
    if isinstance(inputs, Mapping):
        return {k: to_device(v, device, channels_last) for k, v in inputs.items()}
    moved = inputs.to(device, non_blocking=True)
    if channels_last and moved.ndim == 4:
        return moved.contiguous(memory_format=torch.channels_last)
    return moved


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None
