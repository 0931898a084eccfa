"""Numbers that follow from the lengths of the inputs, as text: `n0` is the batch, `n1`, `n2`, ... the other lengths."""

import ast
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from offramp.errors import FormatError

__all__ = ["compile_sizes"]

LONGEST = 2000  # characters of one text; real ones have fewer than a hundred
DEEPEST = 60
LARGEST = 2**63

BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}
CALLS = {"max": max, "min": min, "abs": abs, "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc}

Numbers = Sequence[int]
Length = Callable[[Numbers], Any]


def compile_sizes(texts: Sequence[Any], symbols: int) -> Callable[..., tuple[Any, ...]]:
    """A function of the symbols' values that gives the value of each text.

    A text is arithmetic on n0 to n{symbols-1} and whole numbers; nothing in it is run as code, so that texts may come
    from a file.

        >>> compile_sizes(("n0", "12*n0", "n1//2"), 2)(3, 9)
        (3, 36, 4)

    Raises:
        FormatError: a text is something else.
    """
    lengths = tuple(_length(text, symbols) for text in texts)
    places = [place for _, place in lengths if place is not None]
    if len(places) == len(lengths):  # nearly always: the lengths themselves
        return lambda *numbers: tuple([numbers[place] for place in places])
    calls = tuple(call for call, _ in lengths)
    return lambda *numbers: tuple([call(numbers) for call in calls])


def _length(text: Any, symbols: int) -> tuple[Length, int | None]:
    """(the function of a text, the symbol's place when the text is one symbol alone)."""
    if not isinstance(text, str) or len(text) > LONGEST:
        raise FormatError(f"a size is {str(text)[:80]!r}; expected arithmetic on n0, n1, ...")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise FormatError(f"a size is {text[:80]!r}; expected arithmetic on n0, n1, ...") from None
    place = _place(tree, symbols)
    return _term(tree, symbols, 0, text), place


def _place(tree: ast.expr, symbols: int) -> int | None:
    if isinstance(tree, ast.Name) and tree.id in (names := [f"n{i}" for i in range(symbols)]):
        return names.index(tree.id)
    return None


def _term(tree: ast.expr, symbols: int, depth: int, text: str) -> Length:
    """The function of one node of the text's tree."""
    if depth <= DEEPEST:
        if (place := _place(tree, symbols)) is not None:
            return operator.itemgetter(place)
        if isinstance(tree, ast.Constant) and type(tree.value) is int and abs(tree.value) < LARGEST:
            value = tree.value
            return lambda numbers: value
        if isinstance(tree, ast.BinOp) and type(tree.op) in BINARY:
            combine = BINARY[type(tree.op)]
            left, right = (_term(side, symbols, depth + 1, text) for side in (tree.left, tree.right))
            return lambda numbers: combine(left(numbers), right(numbers))
        if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Pow) and _small(tree.right):
            base, exponent = _term(tree.left, symbols, depth + 1, text), tree.right.value  # type: ignore[attr-defined]
            return lambda numbers: base(numbers) ** exponent
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
            inner = _term(tree.operand, symbols, depth + 1, text)
            return lambda numbers: -inner(numbers)
        if isinstance(tree, ast.Call) and _called(tree.func) in CALLS and tree.args and not tree.keywords:
            call: Callable[..., Any] = CALLS[_called(tree.func)]  # type: ignore[assignment]
            inners = [_term(argument, symbols, depth + 1, text) for argument in tree.args]
            return lambda numbers: call(*[inner(numbers) for inner in inners])
    raise FormatError(
        f"a size is {text[:80]!r}; expected arithmetic (+ - * // / % **, max, min, floor, ceil) on n0 to "
        f"n{symbols - 1}."
    )


def _small(tree: ast.expr) -> bool:
    """Whether a node is a whole number that may be an exponent."""
    return isinstance(tree, ast.Constant) and type(tree.value) is int and 0 <= tree.value <= 4


def _called(function: ast.expr) -> str:
    """The name of a function, also as a member of `math`."""
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "math":
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""
