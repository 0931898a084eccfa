"""The model with exits: the original, a head behind each tap, and the stages that are cut from it on demand."""

import threading
from collections.abc import Sequence
from itertools import chain
from operator import is_not
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from offramp.gradients import apart
from offramp.graph import Dynamic, eval_mode, own_precision, three_rows, trace
from offramp.heads import Head
from offramp.inputs import Inputs, mask_of, names_of
from offramp.stages import Stages, stages_by_hand, stages_of_graph
from offramp.taps import Tap, listen, logits_of
from offramp.verify import verify

__all__ = ["ExitModel", "MultiExitModel"]

CUTTING = threading.Lock()  # the export puts hooks on the original for a moment


class ExitModel(nn.Module):
    """What runs with exits: heads, the names of the taps, the number of classes, and stages.

    `MultiExitModel` is one that was attached and can learn; a bundle holds one that was read from data.
    """

    backbone: nn.Module
    heads: nn.ModuleList
    taps: tuple[str, ...]
    classes: int
    #: What heads say beyond logits, in columns behind the classes; `learn_certainty` adds "certainty".
    signals: tuple[str, ...] = ()

    @property
    def exits(self) -> int:
        """E, the number of exits, the model's own output included."""
        return len(self.taps) + 1

    @property
    def example(self) -> Inputs:
        """Inputs that the model takes, where it is."""
        raise NotImplementedError

    def stages(self) -> Stages:
        """The model cut behind its taps, E stages."""
        raise NotImplementedError

    def plain(self, inputs: Inputs) -> Float[Tensor, "batch cls"]:
        """The original's own logits; no head runs."""
        raise NotImplementedError

    def head_logits(
        self, k: int, tap: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> Float[Tensor, "batch cls"]:
        """Exit k's logits from its tap, for k < E-1; `mask` [batch tok] is used by heads that average tokens, and
        `weights` are `mask_weights` of it, where they are known."""
        head = self.heads[k]
        if isinstance(head, Head):
            return head(tap, mask, weights=weights, signals=False)
        columns = self._columns(k, tap, mask)
        return columns[:, : self.classes] if self.signals else columns

    def evidence(
        self, k: int, tap: Tensor, mask: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch cls"], Float[Tensor, "batch sig"] | None]:
        """(exit k's logits, its signals as float32 in [0, 1] in the order of `signals`; None when there are none)."""
        columns = self._columns(k, tap, mask)
        if not self.signals:
            return columns, None
        return columns[:, : self.classes], torch.sigmoid(columns[:, self.classes :].float())

    def forward_with_signals(
        self, inputs: Inputs
    ) -> tuple[Float[Tensor, "exit batch cls"], Float[Tensor, "exit batch sig"] | None]:
        """(the logits of every exit, as `forward` gives them, their signals or None). The last exit's are zeros: a row
        that is there stops, whatever they are."""
        raise NotImplementedError

    def _columns(self, k: int, tap: Tensor, mask: Tensor | None) -> Tensor:
        """What head k gives: its logits, and a column for each signal."""
        head = self.heads[k]
        return head(tap, mask) if getattr(head, "takes_mask", False) else head(tap)

    def _with_signals(
        self, last: Tensor, exits: Sequence[tuple[Tensor, Tensor | None]]
    ) -> tuple[Float[Tensor, "exit batch cls"], Float[Tensor, "exit batch sig"] | None]:
        """What `forward_with_signals` gives, of the last exit's logits and the others' evidence."""
        logits = torch.stack([*(each for each, _ in exits), last])
        if not self.signals:
            return logits, None
        none = torch.zeros(len(last), len(self.signals), device=last.device)
        return logits, torch.stack([*(signals for _, signals in exits if signals is not None), none])


class MultiExitModel(ExitModel):
    """A model with E exits: a head behind each of its E-1 taps, and its own output as the last exit.

    Build it with `offramp.attach`. The original is kept in `backbone`: the same object, its parameters shared.
    Moving or casting this model moves or casts the original; weights updated in place are seen at once.

    Attributes:
        backbone: the original model.
        heads: E-1 heads; `heads[k](tap)` gives logits [batch cls], with the attention mask too if it has `takes_mask`,
            and a column behind them for each of `signals`.
        taps: the names of the taps in the order of execution.
        classes: the number of classes.
        gradients: how the exits' gradients meet in the backbone, see `Recipe.gradients`; answers are the same.
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: Sequence[nn.Module],
        taps: Sequence[Tap],
        classes: int,
        example: Inputs,
        *,
        dynamic: Dynamic | None = None,
        stages: Sequence[nn.Module] | None = None,
        overwritten: Sequence[bool] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)
        self.taps = tuple(tap.name for tap in taps)
        self.classes = classes
        self._taps = tuple(taps)
        self._example = example
        self._dtype = _float_dtype(backbone)
        self._dynamic = dynamic
        self._by_hand = None if stages is None else tuple(stages)
        self._overwritten = tuple(overwritten) or (False,) * len(self._taps)
        self._cut: tuple[Stages, _Watch] | None = None
        self.gradients = "sum"

    @property
    def example(self) -> Inputs:
        """The example that it was attached with, where the original is now, in its type if it was in its type then."""
        return self._placed_example()

    def forward(self, inputs: Inputs) -> Float[Tensor, "exit batch cls"]:
        """The logits of every exit; the last are the original's. Hooks live for the length of this call.

        Args:
            inputs: a tensor [batch ...], or several by name, called as keywords of the original.
        """
        heard, last = self._heard(inputs)
        mask = mask_of(inputs)
        return torch.stack([*(self.head_logits(k, tap, mask) for k, tap in enumerate(heard)), last])

    def forward_with_signals(
        self, inputs: Inputs
    ) -> tuple[Float[Tensor, "exit batch cls"], Float[Tensor, "exit batch sig"] | None]:
        """(the logits of every exit, as `forward` gives them, their signals or None; zeros at the last exit)."""
        heard, last = self._heard(inputs)
        mask = mask_of(inputs)
        return self._with_signals(last, [self.evidence(k, tap, mask) for k, tap in enumerate(heard)])

    def _heard(self, inputs: Inputs) -> tuple[list[Any], Tensor]:
        """What came by at each tap, and the original's logits."""
        heard: list[Any] = [None] * len(self._taps)

        def hear(k: int, tap: Tensor) -> Tensor | None:
            # the original writes into some taps later on (ReLU(inplace=True)); a head must see what the tap was
            seen = tap.clone() if self._overwritten[k] else tap
            if self.gradients == "sum" or not (torch.is_grad_enabled() and tap.requires_grad):
                heard[k] = seen
                return None
            heard[k], onward = apart(self.gradients, k, len(self._taps) + 1, seen, tap)
            return onward

        with listen(self.backbone, self._taps, hear):
            last = self.plain(inputs)
        return heard, last

    def plain(self, inputs: Inputs) -> Float[Tensor, "batch cls"]:
        """The original's own logits; no head runs."""
        output = self.backbone(inputs) if isinstance(inputs, Tensor) else self.backbone(**inputs)
        return logits_of(output, self.backbone)

    def stages(self) -> Stages:
        """The model cut behind its taps, E stages that share its weights and compute in eval mode.

        Cut at the first call and checked on the example; cut again when a parameter or buffer of the original was
        replaced, moved or cast, or a module replaced.

        Raises:
            NotStageable: the model cannot be cut, or a cut model does not give the original's output.
        """
        cut = self._cut
        if cut is None or cut[1].changed():
            with CUTTING:
                cut = self._cut  # another thread may have been faster
                if cut is None or cut[1].changed():
                    self._cut = None
                    cut = self._cut = (self._new_stages(), _Watch(self.backbone))
        return cut[0]

    def recut(self) -> Stages:
        """The stages, cut anew: for changes that leave every parameter, buffer and module in place, such as another
        `eps`, a plain attribute that the forward reads, or a hook. Stages do not see those by themselves."""
        with CUTTING:
            self._cut = None
        return self.stages()

    def _new_stages(self) -> Stages:
        with own_precision(_device(self.backbone)):
            return self._cut_and_verified(three_rows(self._placed_example()))

    def _cut_and_verified(self, example: Inputs) -> Stages:
        needs = any(getattr(head, "takes_mask", False) for head in self.heads)
        mask = "attention_mask" if needs and mask_of(example) is not None else None
        if self._by_hand is not None:
            stages = stages_by_hand(self._by_hand, names_of(example), self.taps, mask, self._plain_in_eval)
        else:
            stages = stages_of_graph(trace(self.backbone, self._taps, example, self._dynamic), self.taps, mask)
        with eval_mode(self), torch.no_grad():
            heard: dict[int, Tensor] = {}
            with listen(self.backbone, self._taps, lambda k, tap: heard.update({k: tap.clone()})):
                logits = self.plain(example)
            verify(stages, self.plain, example, self.taps, [*(heard[k] for k in range(len(self.taps))), logits])
        return stages

    def _plain_in_eval(self, inputs: Inputs) -> Tensor:
        with eval_mode(self.backbone):
            return self.plain(inputs)

    def _placed_example(self) -> Inputs:
        """The example where the original is now, in its type if it was in its type when attached."""
        device, dtype = _device(self.backbone), _float_dtype(self.backbone)

        def place(tensor: Tensor) -> Tensor:
            cast = dtype if tensor.is_floating_point() and tensor.dtype == self._dtype else None
            return tensor.to(device=device or tensor.device, dtype=cast or tensor.dtype)

        if isinstance(self._example, Tensor):
            return place(self._example)
        return {name: place(tensor) for name, tensor in self._example.items()}

    def __getstate__(self) -> dict[str, Any]:
        # generated code does not copy; a copy cuts its own
        return {**self.__dict__, "_cut": None}


class _Watch:
    """What the stages were cut from: every module, parameter and buffer of the original, by identity and kind.

    It is asked before every batch, so it compares addresses first and looks at the kinds when one of them differs.
    """

    def __init__(self, model: nn.Module) -> None:
        kinds = ("_modules", "_parameters", "_buffers")
        owners = [owner for module in model.modules() for kind in kinds if (owner := getattr(module, kind))]
        self._owners: list[dict[str, Any]] = owners
        self._held = list(chain.from_iterable(owner.values() for owner in owners))
        self._tensors = [held for held in self._held if isinstance(held, Tensor)]
        self._kinds = list(map(_kind, self._tensors))
        self._places = list(map(Tensor.data_ptr, self._tensors))
        self._weight = next((i for i, tensor in enumerate(self._tensors) if tensor.is_floating_point()), 0)

    def changed(self) -> bool:
        """Whether one was replaced, moved, cast or reshaped since. Values written in place do not count."""
        held = list(chain.from_iterable(owner.values() for owner in self._owners))
        if len(held) != len(self._held) or any(map(is_not, held, self._held)):
            return True
        places = list(map(Tensor.data_ptr, self._tensors))
        # freed memory may be used again after two casts in a row, hence the look at one weight
        if places == self._places and (not places or _kind(self._tensors[self._weight]) == self._kinds[self._weight]):
            return False
        if list(map(_kind, self._tensors)) != self._kinds:
            return True
        self._places = places
        return False


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape


def _device(model: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)


def _float_dtype(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
