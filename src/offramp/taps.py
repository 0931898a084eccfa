"""Taps: named calls of modules, listened to for the length of one forward and no longer."""

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from offramp.errors import NoSuchModule, ValueRangeError

__all__ = ["Tap", "find_taps", "listen", "logits_of"]


@dataclass(frozen=True)
class Tap:
    """One call of one module: `name` as the user wrote it, the module's path, and which call (0 is the first)."""

    name: str
    path: str
    call: int


def find_taps(model: nn.Module, at: Sequence[str]) -> tuple[Tap, ...]:
    """The taps that `at` names, in its order: "path" or, for a module called several times, "path@2".

    Raises:
        NoSuchModule: a name is not a module of the model; the message gives the nearest names.
        ValueRangeError: `at` is empty, names a call twice, or names the model itself.
    """
    names = dict(model.named_modules())
    if not at:
        raise ValueRangeError(
            "`at` is empty; expected the names of one or more modules, such as at=('layer1', 'layer2')."
        )
    found = []
    for name in at:
        path, mark, call = name.rpartition("@")
        if not mark:
            path, call = name, "0"
        if not call.isdecimal():
            raise ValueRangeError(f"{name!r} counts calls with {call!r}; expected a number from 0, as in '{path}@2'.")
        if path not in names:
            near = difflib.get_close_matches(path, [n for n in names if n], n=3, cutoff=0.4)
            hint = f" The nearest names are {', '.join(map(repr, near))}." if near else ""
            raise NoSuchModule(
                f"{type(model).__name__} has no module {path!r}.{hint} "
                "List them with [name for name, _ in model.named_modules()]."
            )
        if path == "":
            raise ValueRangeError(
                "A tap names the whole model; the last exit is that already. Name a module inside it."
            )
        found.append(Tap(name, path, int(call)))
    twice = [n for n, count in Counter((tap.path, tap.call) for tap in found).items() if count > 1]
    if twice:
        raise ValueRangeError(f"`at` names {twice[0][0]!r} twice; expected every tap once.")
    return tuple(found)


@contextmanager
def listen(
    model: nn.Module, taps: Sequence[Tap], hear: Callable[[int, Tensor], Tensor | None]
) -> Iterator[dict[str, int]]:
    """How often each tapped module was called so far, while `hear(k, output)` is called at tap k.

    A tensor that `hear` returns takes the place of the module's output. Hooks are gone when the block ends.
    Clear the counts before each forward when there are several in one block.
    """
    wanted = {(tap.path, tap.call): k for k, tap in enumerate(taps)}
    calls: dict[str, int] = {tap.path: 0 for tap in taps}

    def hook_for(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            call = calls.get(path, 0)
            calls[path] = call + 1
            k = wanted.get((path, call))
            if k is None:
                return None
            changed = hear(k, _first_tensor(output, taps[k]))
            return None if changed is None else _with_first(output, changed)

        return hook

    handles = [model.get_submodule(path).register_forward_hook(hook_for(path)) for path in calls]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(output: Any, tap: Tap) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise ValueRangeError(
        f"Module {tap.name!r} returns {type(output).__name__} without a tensor in it; "
        "expected a tensor, or a tuple or mapping with one. Tap another module."
    )


def _with_first(output: Any, tensor: Tensor) -> Any:
    """The output of a module with its first tensor replaced."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, Mapping):
        key = next(key for key, value in output.items() if isinstance(value, Tensor))
        output[key] = tensor  # type: ignore[index]  # the module's own fresh output, while it is traced
        return output
    place = next(i for i, value in enumerate(output) if isinstance(value, Tensor))
    parts = [*output[:place], tensor, *output[place + 1 :]]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


def logits_of(output: Any, model: nn.Module) -> Tensor:
    """The logits [batch cls] in a model's output: a tensor, or what it holds as `.logits` or ["logits"].

    Raises:
        ValueRangeError: there are none.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise ValueRangeError(
        f"{type(model).__name__} returns {type(output).__name__} without logits; expected a tensor [batch cls], "
        "or an object or mapping with `logits`. Put a module around the model that returns them."
    )
