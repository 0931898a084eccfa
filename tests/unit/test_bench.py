"""The bench in one process on a tiny network: every cell is there, accuracies are right, files are gone on with."""

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from offramp import DataError, Examples, FormatError, MaxProb, Runtime, ValueRangeError, VectorHead, attach
from offramp.bench import Bench, Plan, Subject, bench, left_to_do
from offramp.bench import cells as cells_module
from offramp.bench.memory import Growth, resident_mb
from offramp.bench.page import page_html
from offramp.bench.plan import Pair, pairs_of
from offramp.engines import choose
from offramp.errors import MissingExtra

PLAN = Plan(
    engines=("eager",), batch_sizes=(1, 4), policies=("max-prob", "beem-a"), rows=8, seconds=0.02, stage_seconds=0.01,
    calls=20, threads=1,
)  # fmt: skip


def made(seed=0):
    """A subject: three exits that were never trained, on rows that they are right about now and then."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    model = attach(network, at=("1", "3"), head=VectorHead(), example=torch.randn(2, 8)).eval()
    rows = torch.randn(90, 8)
    with torch.no_grad():
        labels = model.plain(rows).argmax(1)
        labels[::5] = (labels[::5] + 1) % 3
    examples = Examples(rows, labels)
    named = {"half": (MaxProb((0.4, 0.5, 0.0)), "fp32")}
    return Subject(model, examples.select(range(50)), examples.select(range(50, 90)), named, "tiny")


@pytest.fixture(scope="module")
def subject():
    return made()


@pytest.fixture(scope="module")
def found(subject):
    return bench(subject, replace(PLAN, policies=("max-prob", "beem-a", "half")), progress=False)


def test_every_cell_is_there_once_with_figures_that_fit(found):
    keys = [(c.name, c.batch_size, c.policy) for c in found.cells]
    wanted = {("eager:fp32", size, name) for size in (1, 4) for name in ("max-prob", "beem-a", "half")}
    assert set(keys) == wanted
    assert len(keys) == len(wanted)
    for cell in found.cells:
        assert (cell.rows, cell.batches, cell.judged) == (8, 8 // cell.batch_size, 50)
        assert cell.rounds >= 3
        assert sum(cell.shares) == pytest.approx(1)
        assert cell.speedup == pytest.approx(cell.whole.median_ms / cell.live.median_ms)
        assert cell.eager_speedup == pytest.approx(cell.whole_eager_speedup * cell.speedup)
        assert cell.kept == pytest.approx(cell.speedup / cell.promise)
        assert cell.whole.median_ms <= cell.eager.median_ms
        assert cell.live.rows_per_s == pytest.approx(1000 * cell.batch_size / cell.live.median_ms)
        assert cell.accuracy.low <= cell.accuracy.value <= cell.accuracy.high
        assert cell.lost.value == pytest.approx(cell.accuracy.value - cell.plain_accuracy.value)
        assert cell.unused is not None
        assert (cell.tail is not None) == (cell.batch_size == 1)
        if cell.tail is not None:
            assert (cell.tail.calls, cell.tail.rows) == (20, 20)
            assert list(cell.tail.live) == sorted(cell.tail.live)


def test_exits_may_be_off_and_families_may_do_with_fewer(subject, tmp_path):
    off = MaxProb((0.4, 0.5, 0.0), enabled=(True, False, True))
    subject = replace(subject, named={"off": (off, "fp32")})
    plan = replace(PLAN, batch_sizes=(4,), policies=("off", "max-prob"), thin=True)
    thin = bench(subject, plan, out=tmp_path / "bench.json", progress=False)
    facts, (given, family) = thin.engines[0], thin.cells
    assert facts.thresholds["off"].exits == (0, 2)
    assert given.shares[1] == 0
    assert given.unused is not None  # with exit 1 visited
    left = facts.thresholds["max-prob"].exits or (0, 1, 2)
    assert all(share == 0 for k, share in enumerate(family.shares) if k not in left)
    assert Bench.of(json.loads((tmp_path / "bench.json").read_text())) == thin
    assert "off with exits 0, 2" in page_html(thin)
    with pytest.raises(FormatError, match="another thin"):
        left_to_do(subject, replace(plan, thin=False), tmp_path / "bench.json")


def test_accuracy_is_that_of_a_direct_computation(subject, found):
    rows, labels = subject.test.inputs, subject.test.labels
    with torch.no_grad():
        plain = (subject.model.plain(rows).argmax(1) == labels).double().mean().item()
        alone = (subject.model(rows).argmax(-1) == labels).double().mean(1).tolist()
    live = Runtime(subject.model, subject.named["half"][0])(rows)
    right = (live.label == labels).double().mean().item()
    for cell in found.cells:
        assert cell.plain_accuracy.value == cell.whole_accuracy.value == pytest.approx(plain)
        if cell.policy == "half":
            assert cell.accuracy.value == pytest.approx(right)
            assert list(cell.shares) == pytest.approx((torch.bincount(live.exit[:8], minlength=3) / 8).tolist())
        first = next((k for k, value in enumerate(alone[:-1]) if value >= cell.accuracy.value - 1e-9), None)
        assert cell.shorter.exit == first
        assert (cell.shorter.took is None) == (first is None)
        assert bool(cell.shorter.note) == (first is None)
    (facts,) = found.engines
    assert facts.exits == pytest.approx(alone)
    assert facts.why == ""
    assert {name: t.made_on for name, t in facts.thresholds.items()} == dict.fromkeys(facts.thresholds, "fp32")
    assert facts.thresholds["half"].status == "as given"


def test_what_is_picked_instead_is_as_right_and_the_fastest(found):
    cell = found.cells[0]
    other = found.instead(cell)
    if other is not None:
        assert other.accuracy >= cell.accuracy.value
    worst = replace(cell, accuracy=replace(cell.accuracy, value=0.0))
    assert found.instead(worst) is not None
    assert found.instead(replace(cell, accuracy=replace(cell.accuracy, value=1.1))) is None


def test_a_bench_is_json_and_comes_back(found):
    value = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Bench.of(value) == Bench.of(json.loads(json.dumps(Bench.of(value).to_dict())))
    assert Bench.of(value).cells == found.cells
    with pytest.raises(FormatError, match="no bench"):
        Bench.of({**value, "version": 99})
    del value["fields"]["cells"][0]["live"]
    with pytest.raises(FormatError, match="damaged"):
        Bench.of(value)


def test_finished_cells_are_kept_and_the_others_are_gone_on_with(subject, tmp_path, monkeypatch):
    out = tmp_path / "bench.json"
    before = cells_module._Contest.cell
    calls = []

    def stops(self, name, size):
        calls.append((name, size))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return before(self, name, size)

    monkeypatch.setattr(cells_module._Contest, "cell", stops)
    with pytest.raises(KeyboardInterrupt):
        bench(subject, PLAN, out=out, progress=False)
    half = Bench.of(json.loads(out.read_text()))
    assert [(c.policy, c.batch_size) for c in half.cells] == calls[:2]
    assert left_to_do(subject, PLAN, out).cells == (4, 2)
    monkeypatch.setattr(cells_module._Contest, "cell", before)
    whole = bench(subject, PLAN, out=out, progress=False)
    assert whole.cells[:2] == half.cells
    assert {(c.policy, c.batch_size) for c in whole.cells} == {(n, s) for n in ("max-prob", "beem-a") for s in (1, 4)}
    assert left_to_do(subject, PLAN, out).cells == (4, 4)
    again = bench(subject, PLAN, out=out, progress=False)
    assert again == Bench.of(json.loads(out.read_text())) == whole
    more = bench(subject, replace(PLAN, batch_sizes=(1, 4, 8), policies=("beem-a",)), out=out, progress=False)
    assert [(c.policy, c.batch_size) for c in more.cells[4:]] == [("beem-a", 8)]


@pytest.mark.parametrize(
    ("change", "told"), [({"seconds": 0.03}, "another seconds"), ({"fraction": 0.7}, "another fraction")]
)
def test_cells_of_other_settings_are_not_mixed(subject, found, tmp_path, change, told):
    out = tmp_path / "bench.json"
    out.write_text(json.dumps(found.to_dict()))
    with pytest.raises(FormatError, match=told):
        left_to_do(subject, replace(PLAN, **change), out)
    with pytest.raises(FormatError, match="another model"):
        left_to_do(made(seed=1), PLAN, out)
    out.write_text("{}")
    with pytest.raises(FormatError, match="cannot be gone on with"):
        bench(subject, PLAN, out=out, progress=False)


def test_an_engine_that_cannot_run_is_a_line_and_no_crash(subject, monkeypatch):
    def broken(*_, **__):
        raise MissingExtra("running an ONNX file needs onnxruntime: pip install 'offramp[onnx]'.")

    monkeypatch.setitem(choose.HOMES, "onnx", "eager.Gone")
    monkeypatch.setattr("offramp.engines.eager.Gone", broken, raising=False)
    broken.own, broken.others = ("fp32",), ("int8",)
    found = bench(subject, replace(PLAN, engines=("onnx", "eager:fp16", "eager"), batch_sizes=(4,)), progress=False)
    why = {each.name: each.why for each in found.engines}
    assert "offramp[onnx]" in why["onnx:fp32"]
    assert "precision" in why["eager:fp16"]
    assert why["eager:fp32"] == ""
    assert {cell.name for cell in found.cells} == {"eager:fp32"}


def test_a_bf16_engine_is_calibrated_on_its_own_logits(subject):
    found = bench(subject, replace(PLAN, engines=("eager:bf16",), batch_sizes=(4,)), progress=False)
    (facts,) = found.engines
    assert {t.made_on for t in facts.thresholds.values()} == {"bf16"}
    assert set(facts.foreign) == {"max-prob", "beem-a"}
    assert all(0 <= f.changed <= 1 and f.accuracy.low <= f.accuracy.high for f in facts.foreign.values())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"engines": ("onyx",)}, "the engine is 'onyx'"),
        ({"engines": ("onnx:bf16",)}, "no precision 'bf16'"),
        ({"engines": ()}, "at least one"),
        ({"engines": ("eager", "eager")}, "different ones"),
        ({"batch_sizes": (0,)}, "at least 1"),
        ({"batch_sizes": ()}, "batch_sizes is none"),
        ({"batch_sizes": (2, 2)}, "different ones"),
        ({"policies": ()}, "at least one"),
        ({"rows": 0}, "rows is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"seconds": float("nan")}, "above 0"),
        ({"fraction": 0.0}, "above 0"),
    ],
)
def test_plans_that_cannot_be(change, told):
    with pytest.raises(ValueRangeError, match=told):
        replace(PLAN, **change)


def test_subjects_that_do_not_fit(subject):
    with pytest.raises(DataError, match="fewer than one batch of 64"):
        bench(subject, replace(PLAN, batch_sizes=(1, 64)), progress=False)
    with pytest.raises(ValueRangeError, match="'best'; expected half here"):
        bench(subject, replace(PLAN, policies=("best",)), progress=False)
    with pytest.raises(DataError, match="'certainty'"):
        bench(subject, replace(PLAN, policies=("berxit",)), progress=False)
    with pytest.raises(DataError, match="no labels"):
        Subject(subject.model, Examples(torch.randn(4, 8)))
    with pytest.raises(DataError, match="to be calibrated"):
        Subject(subject.model, subject.test).check(PLAN)
    Subject(subject.model, subject.test, named=subject.named).check(replace(PLAN, policies=("half",)))


def test_names_of_engines():
    assert pairs_of(["eager", "onnx-file:int8"]) == (Pair("eager"), Pair("onnx-file", "int8"))
    assert Pair("eager").named("fp32") == Pair("eager", "fp32").named("bf16") == "eager:fp32"


def test_memory_grows_by_what_is_kept():
    if resident_mb() is None or (before := Growth.begin()) is None:
        pytest.skip("this system does not tell")
    held = torch.ones(16 * 2**20)
    grown = Growth.since(before)
    assert grown.kept_mb == pytest.approx(64, abs=24)
    assert grown.peak_mb >= grown.kept_mb - 1
    del held


@pytest.mark.skipif(find_spec("plotly") is None, reason="pages need plotly")
def test_the_page_asks_nothing_of_the_network_and_escapes_words(found):
    text = page_html(replace(found, title="<b>tiny</b>"))
    assert "<b>tiny" not in text
    assert "&lt;b&gt;tiny" in text
    assert 'id="answers"' in text
    assert '<button type="button" value="4"' in text
    head = text[: text.index('id="plotly"')]
    assert "http" not in head.replace("http-equiv", "")
