"""Every name that a function looks up when it runs is there. The linters do not say: axis words look like names."""

import builtins
import dis
import importlib
import types
from collections.abc import Iterator

import pytest
from sources import modules


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


@pytest.mark.parametrize("name", modules())
def test_every_global_name_is_defined(name: str) -> None:
    module = importlib.import_module(name)
    with open(str(module.__file__), encoding="utf-8") as file:
        whole = compile(file.read(), str(module.__file__), "exec")
    wanted = {
        step.argval for code in codes(whole) for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"
    }
    assert {each for each in wanted if not hasattr(module, each) and not hasattr(builtins, each)} == set()
