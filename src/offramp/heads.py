"""Heads: the small networks that turn a tap into logits, and the values that describe them.

A spec is a frozen dataclass with `build(shape, classes, model)`; `head="auto"` chooses one by the tap's shape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.errors import NoSuchModule, ShapeError, ValueRangeError

__all__ = [
    "Head", "HeadSpec", "MapHead", "TokenHead", "VectorHead", "Wanted", "auto_head", "build_heads", "check_head",
    "mask_weights",
]  # fmt: skip

Shape = tuple[int, ...]


class Head(nn.Module):
    """Logits [batch cls] from a tap; `takes_mask` says whether `forward` wants the attention mask too, `averages`
    whether it takes the mean over the tokens that the mask keeps."""

    takes_mask = False
    averages = False

    def forward(
        self, tap: Tensor, mask: Tensor | None = None, *, weights: Tensor | None = None, signals: bool = True
    ) -> Tensor:
        """Logits [batch cls].

        Args:
            tap, mask: what the head sees.
            weights: `mask_weights` of the mask, where somebody has them already.
            signals: False leaves out what was learned beside the logits.
        """
        raise NotImplementedError


@runtime_checkable
class HeadSpec(Protocol):
    """A value that builds a head for a tap of a given shape."""

    def build(self, shape: Shape, classes: int, model: nn.Module) -> nn.Module:
        """A new head for taps of `shape`, the batch included, with `classes` outputs."""
        ...


@dataclass(frozen=True)
class MapHead:
    """A head for image maps [batch ch height width]: convolutions if wanted, then average pool and linear.

    Args:
        convs: how many 3x3 convolutions with BatchNorm and ReLU come first; EENet has three.
        divide: the first of them divides the channels by this; EENet divides by 4 in ResNets.
        dropout: probability of dropping a pooled feature in training.
        grid: the map is averaged over grid x grid patches; 1 averages it as a whole, more keeps where things are.
    """

    convs: int = 0
    divide: int = 1
    dropout: float = 0.0
    grid: int = 1

    def __post_init__(self) -> None:
        if self.convs < 0 or self.divide < 1 or self.grid < 1 or (self.divide > 1 and not self.convs):
            raise ValueRangeError(
                f"{self} cannot be built; expected convs >= 0, grid >= 1, and divide > 1 only with convs >= 1."
            )

    def build(self, shape: Shape, classes: int, model: nn.Module) -> nn.Module:
        """A new head for maps of `shape`.

        Raises:
            ShapeError: the shape is not [batch ch height width].
        """
        ch = _axes(shape, "batch ch height width", self)[1]
        width = max(1, ch // self.divide)
        convs = [_conv(ch if i == 0 else width, width) for i in range(self.convs)]
        return _MapHead(nn.Sequential(*convs), width if convs else ch, classes, self.dropout, self.grid)


@dataclass(frozen=True)
class TokenHead:
    """A head for tokens [batch tok dim]: one vector per row, a projection if wanted, then linear.

    Args:
        pool: "first" takes the first token, "mean" the mean over the tokens that the attention mask keeps,
            "attention" one with the weights softmax(tap . q / sqrt(dim)) of a learned q, which begins as the mean.
        pooler: False for none; True for the model's own module called "pooler", or its dotted name: its weights are
            shared, not copied; "own" for a new linear layer and tanh that belong to the head.
        dropout: probability of dropping a pooled feature in training.
    """

    pool: str = "first"
    pooler: bool | str = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.pool not in ("first", "mean", "attention"):
            raise ValueRangeError(f"TokenHead has pool={self.pool!r}; expected 'first', 'mean' or 'attention'.")
        if self.pooler not in (False, "own") and self.pool != "first":
            raise ValueRangeError("The model's own pooler takes the first token; use pool='first' or pooler='own'.")

    def build(self, shape: Shape, classes: int, model: nn.Module) -> nn.Module:
        """A new head for tokens of `shape`.

        Raises:
            ShapeError: the shape is not [batch tok dim].
            NoSuchModule: the pooler to share is not a module of the model.
        """
        dim = _axes(shape, "batch tok dim", self)[2]
        if self.pooler == "own":
            return _TokenHead(self.pool, dim, classes, self.dropout, own=nn.Linear(dim, dim))
        shared = _pooler(model, self.pooler) if self.pooler else None
        return _TokenHead(self.pool, dim, classes, self.dropout, shared=shared)


@dataclass(frozen=True)
class VectorHead:
    """A head for vectors [batch dim]: dropout if wanted, then linear."""

    dropout: float = 0.0

    def build(self, shape: Shape, classes: int, model: nn.Module) -> nn.Module:
        """A new head for vectors of `shape`.

        Raises:
            ShapeError: the shape is not [batch dim].
        """
        return _VectorHead(_axes(shape, "batch dim", self)[1], classes, self.dropout)


SHORT: dict[str, HeadSpec] = {
    "map": MapHead(),
    "conv": MapHead(convs=3, divide=4),
    "first": TokenHead("first"),
    "mean": TokenHead("mean"),
    "projected": TokenHead("mean", pooler="own"),
    "attention": TokenHead("attention"),
    "pooler": TokenHead("first", pooler=True),
    "vector": VectorHead(),
}
#: of texts, unless one is named: the first token of an early layer may hold next to nothing, the mean of the tokens
#: always holds something, and a projection makes early exits better (docs/results.md, better exits)
TEXT_HEAD = "projected"
Wanted = str | HeadSpec | nn.Module | Callable[[Shape, int], nn.Module]


def check_head(name: str | None) -> None:
    """Nothing; an error where a head that is named by a word is not known. None stands for whatever is the default.

    Raises:
        ValueRangeError: the word is none of the short names, nor "auto".
    """
    if name not in (None, "auto", *SHORT):
        raise ValueRangeError(f"the head {name!r} is not known; expected auto, {', '.join(SHORT)}.")


def auto_head(shape: Shape, model: nn.Module) -> HeadSpec:
    """The head that fits a tap of `shape`: maps are averaged, vectors taken as they are, tokens by the model's habit.

    The first token is taken when the model has a pooler with weights or a class token, else the masked mean.

    Raises:
        ShapeError: the tap has neither two, three nor four axes.
    """
    if len(shape) == 4:
        return MapHead()
    if len(shape) == 2:
        return VectorHead()
    if len(shape) == 3:
        return TokenHead("first" if _has_first_token(model) else "mean")
    raise ShapeError(
        f"A tap has shape {list(shape)}; expected [batch ch height width], [batch tok dim] or [batch dim]. "
        "Tap another module, or give head= a callable (shape, classes) -> nn.Module."
    )


def build_heads(
    wanted: Wanted | Sequence[Wanted], shapes: Sequence[Shape], classes: int, model: nn.Module
) -> list[nn.Module]:
    """One new head per tap shape, from one wish for all of them or a list with one for each.

    A wish is "auto", a short name, a spec, a module, or a callable (shape, classes) -> module.

    Raises:
        ValueRangeError: a wish is none of these, or their number differs from the number of taps.
        ShapeError: a spec does not fit its tap.
    """
    if isinstance(wanted, Sequence | nn.ModuleList) and not isinstance(wanted, str):
        wishes = list(wanted)
        if len(wishes) != len(shapes):
            raise ValueRangeError(f"head= has {len(wishes)} entries for {len(shapes)} taps; expected one for each.")
    elif isinstance(wanted, nn.Module) and len(shapes) > 1:
        raise ValueRangeError(
            f"head= is one module for {len(shapes)} taps, which would share its weights; "
            "expected a list of modules, a spec, or a callable (shape, classes) -> nn.Module."
        )
    else:
        wishes = [wanted] * len(shapes)
    return [_build(wish, tuple(shape), classes, model) for wish, shape in zip(wishes, shapes, strict=True)]


def _build(wish: Wanted, shape: Shape, classes: int, model: nn.Module) -> nn.Module:
    if isinstance(wish, nn.Module):
        return wish
    if isinstance(wish, str):
        if wish != "auto" and wish not in SHORT:
            raise ValueRangeError(
                f"head={wish!r} is not known; expected 'auto', {', '.join(map(repr, SHORT))}, or a spec."
            )
        return (auto_head(shape, model) if wish == "auto" else SHORT[wish]).build(shape, classes, model)
    if isinstance(wish, HeadSpec):
        return wish.build(shape, classes, model)
    head = wish(shape, classes) if callable(wish) else None
    if not isinstance(head, nn.Module):
        raise ValueRangeError(f"head= gave {type(head).__name__} for {wish!r}; expected an nn.Module.")
    return head


def _axes(shape: Shape, axes: str, spec: object) -> Shape:
    if len(shape) != len(axes.split()):
        raise ShapeError(
            f"{spec} was given a tap of shape {list(shape)}; expected [{axes}]. Use head='auto' or another."
        )
    return shape


def _conv(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


def _has_first_token(model: nn.Module) -> bool:
    """Whether rows are summed up in the first token; an average pool that is called "pooler" (Swin) does not count."""
    poolers = (m for name, m in model.named_modules() if name.rpartition(".")[2] == "pooler")
    tokens = ("cls_token", "class_token", "class_embedding")
    return any(next(m.parameters(), None) is not None for m in poolers) or any(
        name.rpartition(".")[2] in tokens for name, _ in model.named_parameters()
    )


def _pooler(model: nn.Module, name: bool | str) -> nn.Module:
    modules = dict(model.named_modules())
    found = [n for n in modules if n == name or (name is True and n.rpartition(".")[2] == "pooler")]
    if len(found) != 1:
        wished = "called 'pooler'" if name is True else repr(name)
        raise NoSuchModule(
            f"{type(model).__name__} has {len(found)} modules {wished}; expected one. "
            "Give its dotted name as pooler=, or pooler='own' for a projection of the head's own."
        )
    return modules[found[0]]


class _MapHead(Head):
    def __init__(self, convs: nn.Sequential, ch: int, classes: int, dropout: float, grid: int) -> None:
        super().__init__()
        self.convs = convs
        self.grid = grid
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(ch * grid * grid, classes)

    def forward(
        self, tap: Float[Tensor, "batch ch height width"], mask: Tensor | None = None, *,
        weights: Tensor | None = None, signals: bool = True,
    ) -> Float[Tensor, "batch cls"]:  # fmt: skip
        tap = self.convs(tap)
        pooled = tap.mean((2, 3)) if self.grid == 1 else F.adaptive_avg_pool2d(tap, self.grid).flatten(1)
        return _classify(self, pooled, signals)


class _TokenHead(Head):
    def __init__(
        self,
        pool: str,
        dim: int,
        classes: int,
        dropout: float,
        own: nn.Module | None = None,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.takes_mask, self.averages = pool in ("mean", "attention"), pool == "mean"
        self.own = own
        if pool == "attention":
            self.query = nn.Parameter(torch.zeros(dim))
        # in a tuple, so that the weights stay the model's alone: not this head's parameters, not twice in a state_dict
        self._shared = (shared,)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(dim, classes)

    def forward(
        self, tap: Float[Tensor, "batch tok dim"], mask: Tensor | None = None, *,
        weights: Tensor | None = None, signals: bool = True,
    ) -> Float[Tensor, "batch cls"]:  # fmt: skip
        shared = self._shared[0]
        if shared is not None:
            pooled = shared(tap)
        elif self.pool == "attention":
            pooled = _masked_mean(tap, mask, _attention(tap, mask, self.query))
        else:
            pooled = tap[:, 0] if self.pool == "first" else _masked_mean(tap, mask, weights)
        if self.own is not None:
            pooled = torch.tanh(self.own(pooled))
        return _classify(self, pooled, signals)


class _VectorHead(Head):
    def __init__(self, dim: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(dim, classes)

    def forward(
        self, tap: Float[Tensor, "batch dim"], mask: Tensor | None = None, *,
        weights: Tensor | None = None, signals: bool = True,
    ) -> Float[Tensor, "batch cls"]:  # fmt: skip
        return _classify(self, tap, signals)


def _classify(head: Any, pooled: Float[Tensor, "batch dim"], signals: bool) -> Float[Tensor, "batch cls"]:
    """Logits of a head with `dropout` and `linear`. At batch 1 every call of a module shows, so eval mode makes one."""
    linear = head.linear
    if head.training:
        pooled = head.dropout(pooled)
    if signals or not hasattr(linear, "signal_weight"):
        return linear(pooled)
    return F.linear(pooled, linear.weight, linear.bias)


def mask_weights(mask: Tensor, dtype: torch.dtype) -> Float[Tensor, "batch 1 tok"]:
    """What each token counts in the mean over those where the mask [batch tok] is not zero."""
    keep = (mask != 0).to(dtype)
    return (keep / keep.sum(1, keepdim=True).clamp_(min=1)).unsqueeze(1)


def _masked_mean(
    tap: Float[Tensor, "batch tok dim"], mask: Tensor | None, weights: Tensor | None
) -> Float[Tensor, "batch dim"]:
    """The mean over the tokens where the mask [batch tok] is not zero, or over all of them without a mask."""
    if weights is not None:
        return torch.bmm(weights, tap).squeeze(1)
    if mask is None:
        return tap.mean(1)
    _check_mask(tap, mask)
    # a product with the mask as a row: no masked copy of the tap is made
    return torch.bmm(mask_weights(mask, tap.dtype), tap).squeeze(1)


def _attention(
    tap: Float[Tensor, "batch tok dim"], mask: Tensor | None, query: Float[Tensor, "dim"]
) -> Float[Tensor, "batch 1 tok"]:
    """What each token counts by its product with the query, among those where the mask is not zero."""
    scores = (tap @ query).float() / tap.shape[2] ** 0.5
    if mask is not None:
        _check_mask(tap, mask)
        scores = scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1).to(tap.dtype).unsqueeze(1)


def _check_mask(tap: Float[Tensor, "batch tok dim"], mask: Tensor) -> None:
    if mask.shape != tap.shape[:2]:
        raise ShapeError(
            f"The attention mask has shape {list(mask.shape)} and the tap {list(tap.shape)}; expected a mask "
            f"{list(tap.shape[:2])}. Use TokenHead('first'), or a head of your own."
        )
