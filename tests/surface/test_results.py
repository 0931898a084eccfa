"""Every number in docs/results.md, and of tokens in the README, is what results/ gives."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def render(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    yield pytest.importorskip("experiments.render")
    for name in [name for name in sys.modules if name.startswith("experiments")]:
        del sys.modules[name]


def test_the_pages_are_what_the_results_give(render) -> None:
    names = set()
    for page in render.PAGES:
        text = page.read_text(encoding="utf-8")
        assert render.rendered(text) == text, f"{page}: run make results"
        names |= {match[2].partition("-")[0] for match in render.BLOCK.finditer(text)}
    assert names == set(render.BLOCKS)


def test_a_changed_figure_changes_the_pages(render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [page.read_text(encoding="utf-8") for page in render.PAGES]
    monkeypatch.setattr(sys.modules["experiments.page"], "RESULTS", tmp_path)
    for page in pages:
        emptied = render.rendered(page)
        assert emptied.count("Not measured yet.") == len(render.BLOCK.findall(page))
        assert emptied != page


def test_pictures_of_the_page_are_there(render) -> None:
    page = render.PAGE.read_text(encoding="utf-8")
    for line in page.splitlines():
        if line.startswith("!["):
            assert (render.PAGE.parent / line.partition("(")[2].rstrip(")")).is_file(), line
