"""The source files, and what they import of ours."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "offramp"


@cache
def modules() -> dict[str, ast.Module]:
    """The syntax tree of every module by its dotted name."""
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        found[name_of(path)] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def name_of(path: Path) -> str:
    parts = ("offramp", *path.relative_to(SRC).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(name: str) -> set[str]:
    """The modules of ours that a module imports anywhere, functions included."""
    found: set[str] = set()
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "offramp"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "offramp":
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules())
            found |= inner or {str(node.module)}
            if inner and len(inner) < len(node.names):
                found.add(str(node.module))
    return found - {name}
