"""Every number in docs/results.md is what results/ gives."""

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


def test_the_page_is_what_the_results_give(render) -> None:
    page = render.PAGE.read_text(encoding="utf-8")
    assert render.rendered(page) == page, "run: make results"
    names = {match[2].partition("-")[0] for match in render.BLOCK.finditer(page)}
    assert names == set(render.BLOCKS)


def test_a_changed_figure_changes_the_page(render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = render.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    emptied = render.rendered(page)
    assert emptied.count("Not measured yet.") == len(render.BLOCK.findall(page))
    assert emptied != page


def test_pictures_of_the_page_are_there(render) -> None:
    page = render.PAGE.read_text(encoding="utf-8")
    for line in page.splitlines():
        if line.startswith("!["):
            assert (render.PAGE.parent / line.partition("(")[2].rstrip(")")).is_file(), line
