"""A learned certainty at every exit: whether the exit is right, read off the features that its classifier sees."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.errors import DataError, NoSuchModule, ShapeError, ValueRangeError
from offramp.graph import eval_mode
from offramp.loaders import as_data, as_loader
from offramp.meter import Meter
from offramp.model import MultiExitModel
from offramp.quality import auroc
from offramp.record import to_device
from offramp.shapes import check_finite, check_labels

__all__ = ["CertaintyReport", "WideLinear", "learn_certainty", "widen"]

CERTAINTY = "certainty"


@dataclass(frozen=True)
class CertaintyReport:
    """What was learned. Every tuple has one entry for each exit but the last.

    Args:
        rows: how many were learned from.
        seconds: what it took.
        right: the share of rows at which the exit is right.
        error_before, error: the mean squared error between the certainty and 1[exit is right], on these rows.
        auroc_before, auroc: how likely a row that the exit has right is more certain than one that it has wrong, on
            these rows; 0.5 is chance, and None where all rows are right, or all wrong.
    """

    rows: int
    seconds: float
    right: tuple[float, ...]
    error_before: tuple[float, ...]
    error: tuple[float, ...]
    auroc_before: tuple[float | None, ...]
    auroc: tuple[float | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


class WideLinear(nn.Linear):
    """A linear layer, and rows beside it that give signals: [batch ... out_features + signals].

    The layer's weight and bias are kept, not copied. They are multiplied by themselves, so that what the layer gave
    before it gives still, bit for bit; one wider product may round otherwise.

    Args:
        linear: the layer.
        signals: how many rows; they are zeros at first, and only `learn_certainty` changes them.
    """

    def __init__(self, linear: nn.Linear, signals: int) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        zeros = linear.weight.detach().new_zeros
        self.signal_weight = nn.Parameter(zeros(signals, linear.in_features), requires_grad=False)
        self.signal_bias = nn.Parameter(zeros(signals), requires_grad=False)
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """[batch ... out_features + signals]: what the layer gives, and the signals before their sigmoid."""
        return torch.cat((super().forward(input), F.linear(input, self.signal_weight, self.signal_bias)), dim=-1)


def learn_certainty(
    model: MultiExitModel,
    data: Any,
    *,
    epochs: int = 3,
    lr: float = 0.05,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> CertaintyReport:
    """What was learned, after the model was given the signal "certainty": what BERxiT decides by.

    At exit k it is sigmoid(c_k . h_k + b_k), where h_k is what the last linear layer of head k sees. That layer gets a
    row more, which alone is learned, by the squared error between the certainty and 1[exit k is right]. Logits stay as
    they are, bit for bit. Learned again, it starts anew. After the model itself was trained further, learn it again.

        train(model, rows)
        learn_certainty(model, rows)
        trace = record(model, held_out)                       # has the signal
        found = calibrate(BERxiT, trace, costs, Budget(fraction=0.5))

    The model runs once over the data, in eval mode, where it is; all heads' features stay in memory there. Where exits
    know their own rows by heart, rows that they were not trained on teach more.

    Args:
        data: labelled; `Examples`, a pair (inputs, labels), a torch Dataset with a length, or a DataLoader.
        epochs: passes over the kept features. They are fast; give more for few rows.
        lr: of Adam on standardised features; it falls to zero.
        seed: of the order of rows. The same seed gives the same rows.

    Raises:
        DataError: the data have no labels, are empty, or of no kind that can be used.
        NoSuchModule: a head does not end in an nn.Linear of its own with `classes` outputs.
        ShapeError, ValueRangeError: it is no model from `attach`, labels do not fit it, or a number is out of range.
    """
    if not isinstance(model, MultiExitModel):
        raise ShapeError(f"the model is {type(model).__name__}; expected what attach(...) returned.")
    if epochs < 1 or batch_size < 1 or not 0 < lr < float("inf"):
        raise ValueRangeError(f"epochs={epochs}, batch_size={batch_size}, lr={lr}; expected 1 or more, and lr above 0.")
    began, finals = time.perf_counter(), _finals(model)
    features, right = _gather(model, finals, as_data(data), batch_size, progress)
    before = [_certainty(x, layer) for x, layer in zip(features, finals, strict=True)]
    rows = _fit(features, right, epochs, lr, batch_size, seed, progress)
    wide = widen(model)
    with torch.no_grad():
        for layer, (weight, bias) in zip(wide, rows, strict=True):
            layer.signal_weight.copy_(weight[None])
            layer.signal_bias.fill_(bias)
    after = [_certainty(x, layer) for x, layer in zip(features, wide, strict=True)]
    return CertaintyReport(
        rows=right.shape[1],
        seconds=time.perf_counter() - began,
        right=tuple(right.double().mean(dim=1).tolist()),
        error_before=_errors(before, right),
        error=_errors(after, right),
        auroc_before=tuple(map(auroc, before, right)),
        auroc=tuple(map(auroc, after, right)),
    )


def widen(model: MultiExitModel, signals: tuple[str, ...] = (CERTAINTY,)) -> list[WideLinear]:
    """The last layer of each head, after it was widened by a row for each signal and the model was told their names.

    Layers that are so wide already stay. Rows are zeros until they are learned or filled.

    Raises:
        NoSuchModule: a head does not end in an nn.Linear of its own with `classes` outputs.
    """
    finals = _finals(model)
    places = [_places(model, k, layer) for k, layer in enumerate(finals)]
    owners: dict[int, int] = {}
    for k, found in enumerate(places):
        for parent, _ in found:
            if parent is not model.heads and owners.setdefault(id(parent), k) != k:
                raise NoSuchModule(
                    f"the heads at {model.taps[owners[id(parent)]]!r} and {model.taps[k]!r} share the module that "
                    "holds their last layer, so neither can have its own certainty. Give each exit a head of its own."
                )
    wide: list[WideLinear] = []
    for layer, found in zip(finals, places, strict=True):
        fits = isinstance(layer, WideLinear) and len(layer.signal_bias) == len(signals)
        wide.append(layer if fits else WideLinear(layer, len(signals)))  # type: ignore[arg-type]
        for parent, name in found:
            setattr(parent, name, wide[-1])
    model.signals = tuple(signals)
    return wide


def _places(model: MultiExitModel, k: int, layer: nn.Linear) -> list[tuple[nn.Module, str]]:
    """(module, name in it) wherever head k holds the layer. A layer that the original has too is changed in the head
    alone."""
    found = [(parent, name) for parent in model.heads[k].modules() for name, child in parent.named_children()
             if child is layer]  # fmt: skip
    if model.heads[k] is layer:
        found.append((model.heads, str(k)))
    theirs = set(map(id, model.backbone.modules()))
    if not found or any(id(parent) in theirs for parent, _ in found):
        raise NoSuchModule(
            f"the head at {model.taps[k]!r} ends in a layer inside of a module of the original, which must stay as it "
            "is. Give that exit a head that ends in an nn.Linear of its own."
        )
    return found


@contextmanager
def _hearing(model: MultiExitModel, hear: Callable[[int, nn.Linear, Tensor, Tensor], None]) -> Iterator[None]:
    """The block runs with `hear(k, layer, its input, its output)` called for every linear layer that head k calls."""
    inside: list[int] = []  # a head may be a layer that another head calls, so the outermost counts

    def enter(k: int) -> Callable[..., None]:
        return lambda *_: inside.append(k)

    def leave(*_: Any) -> None:
        inside.pop()

    def heard(layer: Any, args: Any, output: Tensor) -> None:
        if args and inside:
            hear(inside[0], layer, args[0], output)

    layers = [module for module in model.heads.modules() if isinstance(module, nn.Linear)]
    handles = [head.register_forward_pre_hook(enter(k)) for k, head in enumerate(model.heads)]
    handles += [layer.register_forward_hook(heard) for layer in layers]
    handles += [head.register_forward_hook(leave) for head in model.heads]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finals(model: MultiExitModel) -> list[nn.Linear]:
    """The layer of each head whose output is the head's, found by one forward on the model's example."""
    last: dict[int, tuple[nn.Linear, Tensor]] = {}
    if len(set(map(id, model.heads))) < len(model.heads):
        raise NoSuchModule("two exits have the same head, so neither can have its own certainty. Give each its own.")
    with (
        eval_mode(model),
        torch.no_grad(),
        _hearing(model, lambda k, layer, _, output: last.update({k: (layer, output)})),
    ):
        logits, _ = model.forward_with_signals(model.example)  # a forward without them may pass the layer by
    found = []
    for k, tap in enumerate(model.taps):
        layer, output = last.get(k, (None, logits))
        plain = type(layer) in (nn.Linear, WideLinear) and layer is not None and layer.out_features == model.classes
        if not plain or not torch.equal(output[..., : model.classes], logits[k]):
            raise NoSuchModule(
                f"the head at {tap!r} ({type(model.heads[k]).__name__}) does not end in an nn.Linear with "
                f"{model.classes} outputs, whose features a certainty could be learned from. Give attach(head=...) one "
                "that does, such as 'auto', or torch.nn.Sequential(..., torch.nn.Linear(width, classes))."
            )
        found.append(layer)
    return found  # type: ignore[return-value]


def _gather(
    model: MultiExitModel, finals: Sequence[nn.Linear], data: Any, batch_size: int, progress: bool
) -> tuple[list[Float[Tensor, "row dim"]], Bool[Tensor, "exit row"]]:
    """(what each head's last layer sees of every row, whether each exit but the last is right) where the model is."""
    loader = as_loader(data, batch_size, bucket=True)
    device = next(model.parameters()).device
    pieces: list[list[Tensor]] = [[] for _ in finals]
    right: list[Tensor] = []
    seen: dict[int, Tensor] = {}

    def hear(k: int, layer: nn.Linear, entered: Tensor, _: Tensor) -> None:
        if layer is finals[k]:
            seen[k] = entered

    total = len(loader) if hasattr(loader, "__len__") else None
    with eval_mode(model), torch.no_grad(), _hearing(model, hear), Meter("certainty", total, progress) as meter:
        for batch in loader:
            if batch.labels is None:
                raise DataError("a certainty is learned from labelled rows, and these have no labels. Give them.")
            logits = model.forward_with_signals(to_device(batch.inputs, device))[0][:-1]
            labels = check_labels(batch.labels, logits.shape[1], model.classes).to(device)
            right.append(logits.argmax(dim=-1) == labels)
            for k, kept in enumerate(pieces):
                kept.append(seen[k].detach().float())
            meter.advance()
    if not right:
        raise DataError("the data set is empty. Give at least one row.")
    features = [check_finite(torch.cat(kept), f"features of exit {k} [row dim]") for k, kept in enumerate(pieces)]
    return features, torch.cat(right, dim=1)


def _fit(
    features: Sequence[Tensor], right: Tensor, epochs: int, lr: float, batch_size: int, seed: int, progress: bool
) -> list[tuple[Float[Tensor, "dim"], Float[Tensor, ""]]]:
    """(weight, bias) of each exit's certainty.

    Features are standardised, so that one learning rate fits all networks; the result is for features as they come.
    """
    count, device = right.shape[1], right.device
    scales = [_scale(x) for x in features]
    weights = [torch.zeros(x.shape[1], device=device, requires_grad=True) for x in features]
    base = right.float().mean(dim=1).clamp(0.01, 0.99)  # the row starts where it is right on the whole
    biases = torch.logit(base).requires_grad_()
    optimizer = torch.optim.Adam([*weights, biases], lr=lr)
    steps = epochs * -(-count // batch_size)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    wanted = right.float()
    with Meter("certainty", epochs, progress) as meter, torch.enable_grad():
        for _ in range(epochs):
            for index in torch.randperm(count, generator=generator).to(device).split(batch_size):
                loss = torch.zeros((), device=device)
                for k, (x, (mean, std)) in enumerate(zip(features, scales, strict=True)):
                    certainty = torch.sigmoid((x[index] - mean) / std @ weights[k] + biases[k])
                    loss = loss + F.mse_loss(certainty, wanted[k, index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                falling.step()
            meter.advance()
    found = []
    for k, (mean, std) in enumerate(scales):
        weight = weights[k].detach().double() / std.double()
        bias = biases[k].detach().double() - weight @ mean.double()
        found.append((weight.float(), bias.float()))
    return found


def _certainty(x: Float[Tensor, "row dim"], layer: nn.Linear) -> Float[Tensor, "row"]:
    """The certainty of a layer on its features; one half, as of rows of zeros, while it has none."""
    if not isinstance(layer, WideLinear):
        return x.new_full((len(x),), 0.5)
    return torch.sigmoid(F.linear(x, layer.signal_weight.float(), layer.signal_bias.float())[:, 0])


def _scale(x: Float[Tensor, "row dim"]) -> tuple[Float[Tensor, "dim"], Float[Tensor, "dim"]]:
    """(mean, standard deviation) of each feature; one that hardly varies is not blown up."""
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    usual = std.mean()
    return mean, std.clamp(min=1e-2 * float(usual) if usual > 0 else 1.0)


def _errors(certainty: Sequence[Tensor], right: Tensor) -> tuple[float, ...]:
    return tuple(float(F.mse_loss(each.double(), right[k].double())) for k, each in enumerate(certainty))
