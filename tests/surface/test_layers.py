import ast
import re

import pytest
from sources import ROOT, imports, modules


def table() -> dict[str, int]:
    """The layer of every module of ours, by the first part of its name, as docs/architecture.md has it."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    layers: dict[str, int] = {}
    for number, names in re.findall(r"^L(\d)  (\S+(?: \S+)*)  ", text, flags=re.MULTILINE):
        for name in names.split():
            assert name not in layers, f"{name} stands twice in the table"
            layers[name] = int(number)
    return layers


LAYERS = table()
NAMES = [name for name in modules() if name != "offramp"]


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_the_table_has_every_module_and_no_other() -> None:
    assert set(LAYERS) == {part(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_downward(name: str) -> None:
    for other in imports(name):
        assert other != "offramp", f"{name} imports public names; import them from their modules"
        assert LAYERS[part(other)] <= LAYERS[part(name)], f"{name} imports {other}, which is above it"


def test_a_model_knows_no_policy() -> None:
    for name in NAMES:
        if LAYERS[part(name)] == 3:
            upper = {part(other) for other in imports(name) if LAYERS[part(other)] in (1, 2)}
            assert upper <= {"trace", "cost", "quality"}, f"{name} imports {upper}"


def test_no_circles() -> None:
    graph = {name: imports(name) for name in NAMES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in NAMES:
        visit(name, ())


def test_nothing_is_imported_relatively() -> None:
    for name, tree in modules().items():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name}:{node.lineno}"
