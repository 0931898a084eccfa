import ast

import pytest
from sources import SRC, modules, name_of

FILES = sorted(SRC.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_file_is_short_enough_to_read(path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("name", list(modules()))
def test_functions_are_short_and_nothing_is_asserted(name: str) -> None:
    for node in ast.walk(modules()[name]):
        assert not isinstance(node, ast.Assert), f"assert in {name}:{node.lineno}; raise an OfframpError"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{name}.{node.name} has {length} lines"


@pytest.mark.parametrize("name", list(modules()))
def test_public_names_are_documented(name: str) -> None:
    tree = modules()[name]
    assert ast.get_docstring(tree) or not tree.body, f"{name} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    assert ast.get_docstring(method), f"{name}.{node.name}.{method.name} has no docstring"
