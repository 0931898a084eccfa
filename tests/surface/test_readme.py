"""What the documentation says is what the program does."""

import re

import pytest
from commands import check, written
from sources import ROOT

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def blocks(languages: tuple[str, ...]) -> list:
    found = []
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match[1] in languages and "no-run" not in match[2]:
                found.append((path, text[: match.start(3)].count("\n"), match[3]))
    return found


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_python_blocks_run_in_order(path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OFFRAMP_DATA", "")
    namespace: dict[str, object] = {"__name__": "readme"}
    for source, line, code in blocks(("python",)):
        if source == path:
            exec(compile("\n" * line + code, str(source), "exec"), namespace)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        pytest.param(f"{path.name}:{line + 1}", words, id=f"{path.name}:{line + 1} {' '.join(words[:2])}")
        for path, line, code in blocks(("bash", "sh", "console", "shell"))
        for words in written(code)
    ],
)
def test_commands_parse(where: str, words: list[str]) -> None:
    check(words)


def test_commands_are_found_in_blocks() -> None:
    block = "$ A=1 offramp train digits \\\n  --out x  # note\n"
    block += "cat f | .venv/bin/offramp predict x --policy p > out && echo offramp\n"
    assert written(block) == [["train", "digits", "--out", "x"], ["predict", "x", "--policy", "p"]]
