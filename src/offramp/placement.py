"""Where exits go when nobody says: behind the blocks that a network repeats, found in its module tree."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from offramp.errors import ValueRangeError
from offramp.graph import eval_mode
from offramp.inputs import Inputs

__all__ = ["Blocks", "find_blocks", "place"]

MOST_EXITS = 11  # placed by default, besides the model's own output; deeper networks get every second block, or third
MOST_WORK = 0.95  # an exit behind more of the work than this saves nothing worth a head
OUTER = 3.0  # times as much as stages of blocks must the blocks of one stage let one skip, to be taken instead


@dataclass(frozen=True)
class Blocks:
    """The repeated blocks of a network, in the order of execution.

    Args:
        taps: their names for `attach`, the last block's included.
        kind: the name of their class.
        done: the part of the network's work that is done behind each of them, 0 to 1.
    """

    taps: tuple[str, ...]
    kind: str
    done: tuple[float, ...]


@dataclass
class _Seen:
    """What one forward shows of every module: how often it is called, its share of the work, and its first input."""

    calls: Counter[str] = field(default_factory=Counter)
    work: Counter[str] = field(default_factory=Counter)
    begun: dict[str, int] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    done: dict[str, list[float]] = field(default_factory=dict)

    def blocks(self, taps: Sequence[str], kind: str) -> Blocks:
        """The blocks with what is done behind each of them."""
        places = [tap.rpartition("@") if "@" in tap else (tap, "", "0") for tap in taps]
        return Blocks(tuple(taps), kind, tuple(self.done[name][int(call)] for name, _, call in places))


@dataclass(frozen=True)
class _Group:
    blocks: Blocks
    parent: str
    skips: float  # the work of all blocks but the heaviest: most where blocks are many and alike


def find_blocks(model: nn.Module, example: Inputs) -> Blocks:
    """The blocks of a network: modules beside each other, one behind the other, that share the work most evenly.

    These are the layers of a transformer, the stages of a ResNet, Swin or ConvNeXt, the calls of a layer that is
    shared, as ALBERT's, or the parts of a plain `nn.Sequential`.

    Args:
        example: inputs to run the model on once, to see what is called, how often and in which order.

    Raises:
        ValueRangeError: there are no such blocks.
    """
    seen = _run(model, example)
    groups = list(_groups(model, seen))
    if not groups:
        raise ValueRangeError(
            f"{type(model).__name__} has no blocks that repeat, so exits must be placed by hand: give at=(name, ...) "
            f"(--at NAME,NAME). Its modules are {_some(model)}."
        )
    best = max(groups, key=lambda group: group.skips)
    for outer in groups:  # outer ones come first
        around = any(best.parent == tap or best.parent.startswith(f"{tap}.") for tap in outer.blocks.taps)
        if around and outer.skips * OUTER >= best.skips:
            return outer.blocks
    return best.blocks


def place(model: nn.Module, example: Inputs, *, every: int | None = None) -> tuple[str, ...]:
    """The taps behind each `every`-th block but the last, in the order of execution, for `attach(model, at=...)`.

    Args:
        example: inputs to run the model on once.
        every: 1 for an exit behind every block; None takes the least that gives at most 11 exits, and leaves out those
            behind which less than a twentieth of the work is left.

    Raises:
        ValueRangeError: there are no blocks, or fewer than two are left.
    """
    if every is not None and every < 1:
        raise ValueRangeError(f"every is {every}; expected 1 for an exit behind every block, 2 for every second, ...")
    found = find_blocks(model, example)
    count = len(found.taps)
    step = every if every is not None else -(-(count - 1) // MOST_EXITS)
    chosen = list(zip(found.taps, found.done, strict=True))[step - 1 : count - 1 : step]
    if not chosen:
        raise ValueRangeError(f"there are {count} blocks ({found.kind}), so every={step} places no exit. Give less.")
    taps = tuple(tap for tap, done in chosen if every is not None or done <= MOST_WORK)
    if not taps:
        raise ValueRangeError(
            f"behind {chosen[0][0]!r}, the first of {count} blocks ({found.kind}), {100 * chosen[0][1]:.0f} % of the "
            "work is done, so that exits save nothing there. Place them by hand: at=(name, ...) (--at NAME,NAME)."
        )
    return taps


def _run(model: nn.Module, example: Inputs) -> _Seen:
    """What one forward shows. Work is FLOPs, or parameters where torch counts no FLOPs."""
    seen = _Seen()
    started: dict[str, list[int]] = {}
    handles = []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:

        def before(name: str, args: Any, kwargs: Any) -> None:
            seen.begun.setdefault(name, len(seen.begun))
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            seen.given.setdefault(name, tensors[0] if tensors else None)
            started.setdefault(name, []).append(counter.get_total_flops())

        def after(name: str) -> None:
            seen.calls[name] += 1
            total = counter.get_total_flops()
            seen.work[name] += total - started[name].pop()
            seen.done.setdefault(name, []).append(float(total))

        for name, module in model.named_modules():
            handles.append(
                module.register_forward_pre_hook(lambda _, a, k, name=name: before(name, a, k), with_kwargs=True)
            )
            handles.append(module.register_forward_hook(lambda _, a, o, name=name: after(name)))
        try:
            with eval_mode(model), torch.no_grad():
                model(example) if isinstance(example, Tensor) else model(**example)
        finally:
            for handle in handles:
                handle.remove()
    if not seen.work[""]:
        for name, module in model.named_modules():
            seen.work[name] = seen.calls[name] * sum(parameter.numel() for parameter in module.parameters())
    whole = max(1.0, *(done[-1] for done in seen.done.values()))  # 1 where nothing was counted: all are at 0 then
    seen.done = {name: [done / whole for done in ends] for name, ends in seen.done.items()}
    return seen


def _groups(model: nn.Module, seen: _Seen) -> Iterator[_Group]:
    """Every group of blocks, outer ones first; leaves that merely lie in one module when there is no other."""
    fallback = []
    found = False
    for path, parent in model.named_modules():
        for group, whole in _within(path, parent, seen):
            if whole:
                found = True
                yield group
            else:
                fallback.append(group)
    if not found:
        yield from fallback


def _within(path: str, parent: nn.Module, seen: _Seen) -> Iterator[tuple[_Group, bool]]:
    """(group, whether it is more than leaves that lie beside each other) among the children of one module."""
    prefix = f"{path}." if path else ""
    children = [(prefix + name, child) for name, child in parent.named_children()]
    listed = isinstance(parent, nn.ModuleList | nn.Sequential)
    mixed = len({type(child) for _, child in children}) > 1
    classes: dict[type, list[str]] = {}
    for name, child in children:
        calls, inner = seen.calls[name], next(child.children(), None) is not None
        if calls == 1 and seen.work[name]:
            classes.setdefault(type(child), []).append(name)
        if calls > 1 and inner and seen.work[name]:
            taps = tuple(f"{name}@{k}" for k in range(calls))
            blocks = seen.blocks(taps, type(child).__name__)
            yield _Group(blocks, path, seen.work[name] * (1 - 1 / calls)), True
    for kind, names in classes.items():
        inner = next(parent.get_submodule(names[0][len(prefix) :]).children(), None) is not None
        if len(names) > 1 and _in_a_row(names, seen):
            ordered = tuple(sorted(names, key=seen.begun.__getitem__))
            yield (
                _Group(seen.blocks(ordered, kind.__name__), path, _skips(ordered, seen)),
                inner or (listed and not mixed),
            )
    working = [name for name, _ in children if seen.calls[name] == 1 and seen.work[name]]
    if listed and mixed and len(working) > 1 and _in_a_row(working, seen):
        ordered = tuple(sorted(working, key=seen.begun.__getitem__))
        taps = _behind([name for name, _ in children], ordered) if isinstance(parent, nn.Sequential) else ordered
        # less than a group of one class with the same work: blocks are a better guess than stem, blocks and classifier
        blocks = seen.blocks(taps, f"parts of {path or type(parent).__name__}")
        yield _Group(blocks, path, 0.5 * _skips(ordered, seen)), True


def _in_a_row(names: Sequence[str], seen: _Seen) -> bool:
    """Whether no two of the modules are fed the same tensor, as query, key and value are."""
    given = [id(tensor) for name in names if (tensor := seen.given[name]) is not None]
    return len(set(given)) == len(given)


def _skips(names: Sequence[str], seen: _Seen) -> float:
    """The work of all blocks but the heaviest."""
    work = [float(seen.work[name]) for name in names]
    return sum(work) - max(work)


def _behind(names: Sequence[str], parts: Sequence[str]) -> tuple[str, ...]:
    """For each part with weights, the last module before the next: behind its norm, activation and pooling."""
    ends = [names[names.index(after) - 1] for after in parts[1:]]
    return (*ends, names[-1])


def _some(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if name and next(module.parameters(), None) is not None]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none but itself"
