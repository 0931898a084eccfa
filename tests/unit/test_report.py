"""The report: the answer first, one file that asks nothing of the network, no word of the data becomes code."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from test_max_drop import COSTS, trace

from offramp.compare import calibrate_choice, compare
from offramp.cost import Budget
from offramp.errors import DataError, FormatError, ValueRangeError
from offramp.report import Example, Part, Report, build_report, exit_facts, pick_examples, shown_of, to_html, to_picture
from offramp.report.thumbs import shown_row
from offramp.timing import Speed
from offramp.trace import ExitTrace

EVIL = "</script><img src=x onerror=alert(1)>"


def made(speedup: float = 2.0, **more: object) -> Report:
    fit, test = trace(), trace(seed=1)
    curve = compare(fit, test, COSTS, [Budget(fraction=f) for f in (0.4, 0.6, 0.8)], ["max-prob", "beem-a"])
    found = {name: calibrate_choice(name, fit, COSTS, Budget(fraction=0.8)) for name in ("max-prob", "beem-a")}
    shown = [
        shown_of(f"{name}-0.8", name, c.policy, test, COSTS, message=c.message, fitted_rows=c.rows)
        for name, c in found.items()
    ]
    speeds = [
        Speed(size, "max-prob-0.8", 10.0, 10.0 / speedup, 0.1, speedup, 2.2, (0.5, 0.5, 0.0, 0.0)) for size in (1, 8)
    ]
    return build_report(
        test,
        COSTS,
        title=EVIL,
        curve=curve,
        policies=shown,
        speeds=speeds,
        unused=[Speed(1, "none taken", 10.0, 11.0, 0.1, 0.9, None, (0.0, 0.0, 0.0, 1.0))],
        labels=(EVIL, "b", "c"),
        taps=("one", "two", "three"),
        examples=[Example(0, EVIL, "b", 0.9, EVIL), Example(3, "b", "b", 0.5, "", "data:image/png;base64,aGk=")],
        parts=[Part("training", 10, EVIL)],
        notes=[EVIL],
        command=EVIL,
        **more,  # type: ignore[arg-type]
    )


class Seen(HTMLParser):
    """Tags, links to elsewhere, and what handlers a page has."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.bad: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name.startswith("on") or (
                name in ("src", "href", "action") and not (value or "").startswith("data:image/")
            ):
                self.bad.append(f"{tag} {name}={value}")


def test_the_page_is_whole_and_nothing_in_it_is_code_of_the_data() -> None:
    pytest.importorskip("plotly")
    page = to_html(made())
    seen = Seen()
    seen.feed(page)
    assert seen.bad == []
    assert seen.tags.count("script") == 3
    assert seen.tags.count("img") == 1
    assert "link" not in seen.tags
    assert "iframe" not in seen.tags
    packed = re.search(r'id="plotly">([^<]*)<', page)
    assert packed
    outside = page.replace(packed[1], "")
    assert not re.search(r"https?://", outside)
    assert "default-src 'none'" in page
    data = re.search(r'id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert data
    assert "<" not in data[1]
    value = json.loads(data[1])
    assert value["labels"][0] == EVIL
    assert [round(p["cost"], 6) for p in value["curve"]] == [round(p.cost, 6) for p in made().curve]
    assert len(page) < 3_000_000


def test_the_answer_comes_first_and_is_honest() -> None:
    report = made()
    best = report.best()
    assert best is not None
    assert best[1].speedup == 2.0
    assert report.headline().startswith("2.0 times faster at ")
    assert report.headline() in to_html(report)
    assert "2.20" in report.detail()
    assert made(speedup=0.8).headline() == "Exits do not pay here: no policy ran faster than the plain model"
    bare = build_report(trace(seed=1), COSTS, title="t", policies=())
    assert "No policy keeps" in bare.headline()
    counted = build_report(trace(seed=1), COSTS, title="t", policies=report.policies)
    assert "(counted, not timed)" in counted.headline()
    assert "makes no claim about speed" in to_html(counted)


def test_a_report_is_read_back_as_it_was(tmp_path: Path) -> None:
    report = made(metric="macro-f1")
    assert Report.load(report.save(tmp_path / "r.json")) == report
    value = json.loads((tmp_path / "r.json").read_text())
    for change in ({"kind": "x"}, {"version": 2}, {"fields": {**value["fields"], "plain": [1]}}, {"fields": {}},
                   {"fields": {**value["fields"], "curve": [{"family": 3}]}}):  # fmt: skip
        (tmp_path / "r.json").write_text(json.dumps({**value, **change}))
        with pytest.raises(FormatError):
            Report.load(tmp_path / "r.json")


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    report = made()
    png = image.open(to_picture(report, tmp_path / "a.png")).convert("L")
    assert png.width > 900
    assert len(set(png.getdata())) > 50
    assert b"<svg" in to_picture(report, tmp_path / "a.svg").read_bytes()
    with pytest.raises(ValueRangeError, match=r"expected \.svg"):
        to_picture(report, tmp_path / "a.gif")


def test_facts_of_exits_by_hand() -> None:
    logits = torch.log(torch.tensor([[[0.9, 0.1], [0.8, 0.2]], [[0.6, 0.4], [0.3, 0.7]]]))
    facts = exit_facts(ExitTrace(logits, torch.tensor([0, 1])), COSTS.__class__.from_costs((0.5, 1.0)), ("here",))
    assert [f.accuracy for f in facts] == [0.5, 1.0]
    assert [f.tap for f in facts] == ["here", "the model's own output"]
    assert facts[0].ece == pytest.approx((0.1 + 0.8) / 2, abs=1e-6)
    assert facts[1].ece == pytest.approx((0.4 + 0.3) / 2, abs=1e-6)
    assert sum(facts[0].count) == 2
    with pytest.raises(DataError, match="needs labels"):
        exit_facts(ExitTrace(logits), COSTS.__class__.from_costs((0.5, 1.0)))


def test_examples_are_the_earliest_and_the_latest() -> None:
    exits, truth = torch.tensor([0, 3, 1, 3, 0, 2]), torch.zeros(6, dtype=torch.int64)
    said = torch.tensor([0, 0, 1, 1, 0, 0])
    assert pick_examples(exits, said, truth, torch.tensor([0.5, 0.9, 0.8, 0.7, 0.6, 0.4]), each=1) == [4, 2, 1, 3]


def test_rows_as_a_person_sees_them() -> None:
    text, image = shown_row([({"input_ids": torch.tensor([1, 2])}, None)], 0, lambda ids: f"ids {ids}")
    assert (text, image) == ("ids [1, 2]", "")
    assert shown_row([(torch.tensor([1.0, 2.5]), None)], 0, None)[0] == "1, 2.5"
    pytest.importorskip("PIL")
    text, image = shown_row([(torch.rand(3, 8, 8), None)], 0, None)
    assert text == ""
    assert image.startswith("data:image/png;base64,")
