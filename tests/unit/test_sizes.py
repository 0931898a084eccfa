"""Sizes as text: arithmetic on the lengths of the inputs, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import FormatError
from offramp.sizes import compile_sizes


def test_lengths_and_arithmetic() -> None:
    assert compile_sizes(("n1", "n0"), 2)(3, 9) == (9, 3)
    texts = ("12*n0", "n1//2 + 1", "-n0 + n1", "max(n0, n1, 4)", "n1 % 4", "math.floor(n1/2)", "n0**2", "(n0 + n1)*2")
    assert compile_sizes(texts, 2)(3, 9) == (36, 5, 6, 9, 1, 4, 9, 24)
    assert compile_sizes((), 1)(3) == ()


@pytest.mark.parametrize(
    "text",
    [
        "n2",
        "__import__('os')",
        "().__class__",
        "n0.real",
        "open('x')",
        "n0 if n1 else 2",
        "[n0][0]",
        "lambda: n0",
        "n0**99",
        "9**9**9",
        "1e400",
        "True",
        "max(n0, key=n1)",
        "max()",
        "print(n0)",
        "n0 @ n1",
        "n0 +",
        "'a'*n0",
        "f'{n0}'",
        "(n0 := 3)",
        "(" * 500 + "n0" + ")" * 500,
        "n0" + "+n0" * 3000,
        9,
        None,
    ],
)
def test_everything_else_is_refused(text: object) -> None:
    with pytest.raises(FormatError, match="a size is"):
        compile_sizes((text,), 2)  # type: ignore[arg-type]


@given(st.text(alphabet="n01 2+-*/()%.,_abcxie'[]{}:=<>", max_size=40))
def test_any_text_is_a_number_or_refused(text: str) -> None:
    try:
        call = compile_sizes((text,), 2)
    except FormatError:
        return
    try:
        (value,) = call(3, 9)
    except (ZeroDivisionError, OverflowError):
        return
    assert isinstance(value, int | float)
