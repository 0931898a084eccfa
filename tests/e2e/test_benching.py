"""`offramp bench` on a run and on a bundle: tables, files, a page, going on, and what it says to mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import offramp as library
from offramp.bench import Bench
from offramp.bundle import Bundle, Choice
from offramp.cli import app
from offramp.preprocess import NumberPreprocess

LABELS, COLUMNS = ("no", "perhaps", "yes"), tuple(f"c{i}" for i in range(6))
SHORT = ("--batch-sizes", "1,4", "--rows", 8, "--seconds", 0.05, "--threads", 1)
PROGRAM = [sys.executable, "-c", "from offramp.cli import main; main()"]


def offramp(*words: object, code: int = 0):
    done = CliRunner().invoke(app, [str(word) for word in words], prog_name="offramp", env={"COLUMNS": "250"})
    assert done.exit_code == code, f"{done.exit_code}: {done.stdout}\n{done.stderr}\n{done.exception!r}"
    assert "Traceback" not in done.stderr
    return done


def mistake(*words: object, code: int = 1) -> str:
    done = offramp(*words, code=code)
    assert done.stdout == ""
    return " ".join(done.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, a policy in it, and labelled rows."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3)]
    model = library.attach(nn.Sequential(*blocks, nn.Linear(6, 3)).eval(), at=("0", "1"), example=torch.randn(2, 6))
    rows = torch.randn(60, 6)
    with torch.no_grad():
        said = model.eval().plain(rows).argmax(1)
    policy = library.MaxProb((0.4, 0.5, 0.0))
    preprocess = NumberPreprocess(COLUMNS, (0.0,) * 6, (1.0,) * 6)
    Bundle(model, LABELS, {"half": Choice(policy)}, preprocess=preprocess, title="blocks").save(folder / "b.offramp")
    lines = [",".join([*COLUMNS, "label"])]
    lines += [",".join([*map(str, row.tolist()), LABELS[k]]) for row, k in zip(rows, said.tolist(), strict=True)]
    (folder / "rows.csv").write_text("\n".join(lines))
    (folder / "few.csv").write_text("\n".join(lines[:7]))
    (folder / "bare.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines))
    return folder


@pytest.fixture(scope="module")
def target(here: Path) -> tuple[object, ...]:
    return ("bench", here / "b.offramp", here / "rows.csv", *SHORT)


def test_a_bundle_with_rows_of_its_own(here: Path, target: tuple[object, ...], tmp_path: Path) -> None:
    files = ("--out", tmp_path / "bench.json")
    files += ("--html", tmp_path / "bench.html") if find_spec("plotly") else ()
    words = (*target, "--engines", "eager,eager:fp16", "--policies", "half,max-prob", *files)
    shown = offramp(*words)
    assert "8 cells; about" in shown.stderr
    for text in ("eager:fp32", "half: fp32 (as given)", "cut at exit", "measured on"):
        assert text in shown.stdout, text
    value = json.loads((tmp_path / "bench.json").read_text())
    found = Bench.of(value)
    assert {(c.name, c.policy, c.batch_size) for c in found.cells} == {
        ("eager:fp32", name, size) for name in ("half", "max-prob") for size in (1, 4)
    }
    assert all(cell.judged == 30 and cell.plain_accuracy.value == 1.0 for cell in found.cells)
    assert found.settings["threads"] == 1
    eager = next(each for each in found.engines if each.name == "eager:fp32")
    if sys.platform == "linux":
        assert eager.peak_mb is not None
    again = offramp(*words, "--json")  # the engine that could not run is tried again, the cells are not measured again
    fields = json.loads(again.stdout)
    assert Bench.of({**value, "fields": fields}).cells == found.cells
    assert "4 are known" in again.stderr
    assert "another seconds" in mistake(*words, "--seconds", 0.07)
    if find_spec("plotly"):
        assert "<title>Engines with exits: blocks" in (tmp_path / "bench.html").read_text()


@pytest.mark.slow
def test_onnx_where_it_is_installed(target: tuple[object, ...]) -> None:
    words = (*target, "--engines", "onnx-file:int8", "--policies", "half", "--batch-sizes", 1, "--json")
    if not (find_spec("onnxruntime") and find_spec("onnx")):
        assert "no engine ran: onnx-file:int8" in mistake(*words)
        return
    fields = json.loads(offramp(*words).stdout)
    assert [(c["engine"], c["precision"], c["batch_size"]) for c in fields["cells"]] == [("onnx-file", "int8", 1)]
    assert fields["cells"][0]["tail"]["calls"] == 200
    assert fields["versions"]["onnxruntime"]


def test_a_run_has_rows_of_its_own(tmp_path: Path) -> None:
    run = tmp_path / "digits"
    offramp("train", "digits", "--epochs", 1, "--limit", 100, "--out", run)
    words = ("bench", run, "--engines", "eager", "--policies", "max-prob", "--limit", 40, *SHORT, "--batch-sizes", 4)
    fields = json.loads(offramp(*words, "--json").stdout)
    assert [(c["engine"], c["batch_size"]) for c in fields["cells"]] == [("eager", 4)]
    assert fields["settings"]["fitted"] == fields["settings"]["judged"] == 40


def test_an_interrupt_leaves_a_file_to_go_on_with(target: tuple[object, ...], tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    words = [*map(str, target), "--engines", "eager", "--policies", "half,max-prob", "--out", str(out)]
    words[words.index("--seconds") + 1] = "4"
    child = subprocess.Popen(
        [*PROGRAM, *words],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out.exists() and json.loads(out.read_text())["fields"]["cells"]):
        time.sleep(0.1)
    os.kill(child.pid, signal.SIGINT)
    _, told = child.communicate(timeout=20)
    assert child.returncode == 130
    assert f"goes on with what {out} has" in " ".join(told.split())
    assert 1 <= len(Bench.of(json.loads(out.read_text())).cells) < 4


def test_mistakes(here: Path, target: tuple[object, ...], tmp_path: Path) -> None:
    assert "expected whole numbers" in mistake(*target, "--batch-sizes", "0", code=2)
    assert "the engine is 'onyx'" in mistake(*target, "--engines", "onyx", code=2)
    assert "has no precision 'int4'" in mistake(*target, "--engines", "onnx:int4", code=2)
    assert "--policies has 'best'; expected half in" in mistake(*target, "--policies", "best", code=2)
    assert "above 0" in mistake(*target, "--seconds", "-1", code=2)
    assert "fewer than one batch of 64" in mistake(*target, "--batch-sizes", "1,64")
    bundle = here / "b.offramp"
    assert "holds no rows" in mistake("bench", bundle)
    assert "does not exist" in mistake("bench", bundle, here / "none.csv")
    assert "has no column 'label'" in mistake("bench", bundle, here / "bare.csv")
    assert "give at least 10 labelled rows" in mistake("bench", bundle, here / "few.csv", "--batch-sizes", "1")
    assert "neither a bundle nor a run" in mistake("bench", tmp_path)
    assert "no engine ran: eager:fp16" in mistake(*target, "--engines", "eager:fp16")
