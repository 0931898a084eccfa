"""A person's own data and network through the command line: shown, trained, recorded, measured, and built again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from offramp import CostModel, ExitTrace, FormatError, OfframpError
from offramp.cli import app
from offramp.errors import DataError
from offramp.own import Own, prepare, rows_of
from offramp.runs import costs_path, held_out, load_run, read_run, trace_path
from own_material import MODULE, bert, numbers, pictures, reviews, tokenizer, vit

PROGRAM = [sys.executable, "-c", "from offramp.cli import main; main()"]


def offramp(*words: object, code: int = 0):
    """What a command writes; it must end with `code`, and without a traceback."""
    done = CliRunner().invoke(app, [str(word) for word in words], prog_name="offramp")
    assert done.exit_code == code, f"{done.exit_code}: {done.stdout}\n{done.stderr}\n{done.exception!r}"
    assert "Traceback" not in done.stderr
    return done


def mistake(*words: object, code: int = 1) -> str:
    done = offramp(*words, code=code)
    assert done.stdout == ""
    return " ".join(done.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    reviews(folder / "reviews.csv")
    numbers(folder / "numbers.csv")
    pictures(folder / "pictures")
    bert(folder / "bert")
    vit(folder / "vit")
    tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "ofr_ownnet.py").write_text(MODULE)
    return folder


@pytest.fixture(autouse=True)
def there(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(material)


CASES = {
    "text": ("reviews.csv", "--model", "bert", "--epochs", 1),
    "image": ("pictures", "--model", "vit", "--epochs", 1),
    "conv": ("pictures", "--model", "ofr_ownnet:conv", "--epochs", 1),
    "numbers": ("numbers.csv", "--model", "ofr_ownnet:mlp", "--epochs", 2),
    "words": ("reviews.csv", "--model", "ofr_ownnet:Words", "--tokenizer", "tokenizer", "--epochs", 1),
    "resnet": ("pictures", "--model", "resnet20", "--epochs", 1, "--image-size", 16, "--grey"),
}


@pytest.mark.parametrize("name", list(CASES))
def test_from_training_to_a_run_that_is_built_again(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = tmp_path / "run"
    done = offramp("train", *CASES[name], "--out", run, "--json")
    said = json.loads(done.stdout)
    assert said["exits"] >= 2
    for told in ("columns: ", "classes: ", "rows: ", "network: ", "cost up to each exit", " steps, about "):
        assert told in done.stderr, done.stderr
    before = done.stderr.index("training: ")
    assert before < done.stderr.index("epoch 1/")  # the cost is told before the work

    offramp("record", run, "--json")
    assert held_out(run) == ("calibrate", "test")
    trace = ExitTrace.load(trace_path(run, "test"))
    own = Own.of(read_run(run)["own"])
    assert own.rows[2] == trace.rows
    assert trace.ids is not None
    raw = rows_of(own, "test")
    assert trace.ids == tuple(map(str, raw.numbers))
    assert trace.labels is not None
    assert torch.equal(trace.labels, raw.labels)
    offramp("measure", run, "--batch-sizes", "1,2")
    assert CostModel.load(costs_path(run)).exits == trace.exits

    # another folder, and the pretrained one gone: the run alone is enough, but for functions and the rows
    shutil.copytree(run, tmp_path / "copied")
    monkeypatch.chdir(tmp_path)
    if "ofr_" in own.model:
        monkeypatch.delitem(sys.modules, "ofr_ownnet", raising=False)
        with pytest.raises(FormatError, match="which is needed to make its network again"):
            load_run(tmp_path / "copied")
        monkeypatch.chdir(material)
    else:
        hidden = [material / "bert", material / "vit"]
        for path in hidden:
            path.rename(path.with_suffix(".gone"))
    try:
        work, model, _ = load_run(tmp_path / "copied")
    finally:
        for path in (material / "bert", material / "vit"):
            if path.with_suffix(".gone").exists():
                path.with_suffix(".gone").rename(path)
    assert work.preprocess is not None
    inputs = work.preprocess.batch(raw.rows)
    with torch.no_grad():
        assert torch.allclose(model(inputs), trace.logits, atol=1e-5)


def test_a_killed_training_goes_on_as_if_nothing_had_happened(material: Path, tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = ["train", "reviews.csv", "--model", "bert", "--epochs", "12", "--json", "--out"]
    first = subprocess.Popen([*PROGRAM, *words, str(tmp_path / "killed")], env=env, cwd=material)
    until = time.monotonic() + 120
    try:
        while not (tmp_path / "killed" / "checkpoint" / "train.safetensors").exists():
            assert first.poll() is None
            assert time.monotonic() < until
            time.sleep(0.005)
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert not (tmp_path / "killed" / "run.json").exists()
    assert "goes on with it" in mistake("record", tmp_path / "killed")
    reports = []
    for name in ("killed", "whole"):
        done = subprocess.run(
            [*PROGRAM, *words, str(tmp_path / name)], env=env, cwd=material, capture_output=True, text=True, check=True
        )
        reports.append(json.loads(done.stdout)["report"])
    assert reports[0]["resumed_from"] > 0
    assert reports[1]["resumed_from"] is None
    assert reports[0]["epochs"][-1]["loss"] == pytest.approx(reports[1]["epochs"][-1]["loss"], rel=1e-5)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5)


def test_files_for_calibrating_and_testing(material: Path, tmp_path: Path) -> None:
    reviews(tmp_path / "held.csv", 40, seed=5)
    (tmp_path / "test.csv").write_text("\n".join((material / "reviews.csv").read_text().splitlines()[:31]) + "\n")
    run = tmp_path / "run"
    done = offramp("train", "reviews.csv", "--model", "bert", "--epochs", 1, "--out", run,
                   "--validation", tmp_path / "held.csv", "--test", tmp_path / "test.csv")  # fmt: skip
    assert "200 to train on, 40 to calibrate on, 30 to test on" in done.stderr
    assert "30 of the 30 test rows are also among the training rows" in done.stderr
    work, _, _ = load_run(run)
    assert [len(work.load(split, None)) for split in work.splits] == [200, 40, 30]
    with pytest.raises(DataError, match="no split 'validation'"):
        work.load("validation", None)
    one = prepare(Own(data="reviews.csv", model="bert", test=str(tmp_path / "held.csv")))
    assert one.own.rows == (170, 30, 40)


def test_data_that_change_or_go_are_noticed(material: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data.csv", tmp_path / "run"
    shutil.copy(material / "numbers.csv", data)
    offramp("train", data, "--model", "ofr_ownnet:mlp", "--epochs", 1, "--out", run)
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:-1], "1,1,1,yes"]) + "\n")
    assert "are not those that the run was trained with" in mistake("record", run)
    data.unlink()
    assert "does not exist" in mistake("record", run)
    (tmp_path / "moved.csv").write_text("\n".join(lines) + "\n")
    offramp("record", run, "--data", tmp_path / "moved.csv")
    shutil.copytree(material / "pictures", tmp_path / "pictures")
    offramp("train", tmp_path / "pictures", "--model", "ofr_ownnet:conv", "--epochs", 1, "--out", tmp_path / "p")
    (tmp_path / "pictures").rename(tmp_path / "moved")
    offramp("record", tmp_path / "p", "--data", tmp_path / "moved")
    (tmp_path / "moved" / "red" / "00.png").unlink()
    assert "are not those" in mistake("record", tmp_path / "p", "--data", tmp_path / "moved")


def test_classes_that_a_classifier_knows_keep_their_places(material: Path, tmp_path: Path) -> None:
    bert(tmp_path / "named", labels=("POSITIVE", "NEGATIVE"))
    job = prepare(Own(data="reviews.csv", model=str(tmp_path / "named")))
    assert job.own.classes == ("positive", "negative")
    assert job.network.notes == ()
    rows = job.parts[0]
    good = ("lovely", "great", "fine", "warm")
    for row, label in zip(rows.rows, rows.labels.tolist(), strict=True):
        assert (label == 0) == any(word in row["review"].split() for word in good)
    again = rows_of(job.own, "train")
    assert again.classes == rows.classes
    assert torch.equal(again.labels, rows.labels)


def test_mistakes(material: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    assert "--image-size SIDE" in mistake("train", "pictures", "--model", "ofr_ownnet:mlp", *out)
    assert "brings no tokenizer" in mistake("train", "reviews.csv", "--model", "ofr_ownnet:Words", *out)
    assert "takes texts, but the data have images" in mistake("train", "pictures", "--model", "bert", *out)
    assert "gives 2 classes; the data have 3" in mistake("train", three(tmp_path), "--model", "ofr_ownnet:conv", *out)
    assert "no column 'txt'" in mistake("train", "reviews.csv", "--model", "bert", "--text", "txt", *out)
    assert "no module 'bert.encoder.layer.9'" in mistake(
        "train", "reviews.csv", "--model", "bert", "--at", "bert.encoder.layer.9", *out
    )
    bad = numbers(tmp_path / "bad.csv", 600)  # a cell behind those that the guess looks at
    bad.write_text(bad.read_text() + "1,two,3,yes\n")
    assert "line 602 of" in mistake("train", bad, "--model", "ofr_ownnet:mlp", *out)
    assert (
        "1 row(s) cannot be used"
        in offramp("train", bad, "--model", "ofr_ownnet:mlp", "--skip-bad", "--dry-run", *out).stderr
    )
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_damaged_job_is_one_clear_error(material: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    offramp("train", "numbers.csv", "--model", "ofr_ownnet:mlp", "--epochs", 1, "--out", run)
    about = json.loads((run / "run.json").read_text())
    changed = [(key, value) for key in about["fields"]["own"] for value in (5, True, [1], [None], {"a": 1}, 1e308)]
    for key, value in [*changed, ("foreign", 1), ("model", "ofr_ownnet:number"), ("at", ["9"])]:
        own = {**about["fields"]["own"], key: value}
        (run / "run.json").write_text(json.dumps({**about, "fields": {**about["fields"], "own": own}}))
        whole = value == 5 and key in ("every", "epochs", "limit", "seed", "max_length")
        if whole or (value is True and key in ("grey", "skip_bad")) or (value == [1] and key == "rows"):
            continue  # as good as another
        with pytest.raises(OfframpError):
            load_run(run)


def test_a_test_split_without_labels_is_passed_over(material: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    lines = (material / "reviews.csv").read_text().splitlines()
    (folder / "train.csv").write_text("\n".join(lines[:150]) + "\n")
    (folder / "validation.csv").write_text("\n".join([lines[0], *lines[150:]]) + "\n")
    (folder / "test.csv").write_text(lines[0] + "\n1,a great film,\n2,a dull film,-1\n")
    made = prepare(Own(data=str(folder), model="bert"))
    assert made.own.rows == (127, 51, 22)
    assert any("the test rows of" in text and "have no labels" in text for text in made.notes)


def test_what_an_earlier_training_left_is_named(material: Path, tmp_path: Path) -> None:
    words = ("train", "numbers.csv", "--model", "ofr_ownnet:mlp", "--epochs", 1, "--out", tmp_path / "run")
    offramp(*words)
    offramp("record", tmp_path / "run")
    assert "earlier training" not in offramp(*words).stderr  # the same again changes nothing
    assert "another run's" in mistake(*words, "--seed", 1)
    told = offramp(*words, "--seed", 1, "--no-resume").stderr
    assert "calibrate.safetensors, test.safetensors in" in told


def three(folder: Path) -> Path:
    shutil.copytree("pictures", folder / "three")
    shutil.copytree("pictures/red", folder / "three" / "green")
    return folder / "three"


def test_a_corrupt_image_is_named_and_left_out_on_request(material: Path, tmp_path: Path) -> None:
    shutil.copytree(material / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures" / "red" / "03.png").write_bytes(b"no image")
    words = ("train", tmp_path / "pictures", "--model", "ofr_ownnet:conv", "--epochs", 1, "--out", tmp_path / "run")
    assert "03.png is no image" in mistake(*words)
    assert "1 row(s) cannot be used" in offramp(*words, "--skip-bad").stderr
    offramp("record", tmp_path / "run")


def test_a_dry_run_and_attach_write_nothing(material: Path, tmp_path: Path) -> None:
    before = sorted(material.iterdir())
    done = offramp("train", "reviews.csv", "--model", "bert", "--dry-run", "--json", "--out", tmp_path / "run")
    assert json.loads(done.stdout)["taps"] == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert list((tmp_path / "run").iterdir()) == []
    shown = offramp("attach", "bert").stdout
    assert "bert.encoder.layer.1" in shown
    assert "bytes" in shown
    said = json.loads(offramp("attach", "ofr_ownnet:mlp", "--shape", "3", "--every", 1, "--json").stdout)
    assert said["exits"] == len(said["stages"]) == 4
    carry = said["stages"][0]["carry"]
    assert [(item["kind"], item["bytes"]) for item in carry] == [("rows", 64), ("size", 0)]
    assert sum(stage["flops"] for stage in said["stages"]) == pytest.approx(said["plain_flops"])
    assert "needs the shape of one row" in mistake("attach", "ofr_ownnet:mlp", code=2)
    assert "fails on input [2, 4]" in mistake("attach", "ofr_ownnet:mlp", "--shape", "4")
    shutil.copytree("bert", tmp_path / "bare", ignore=shutil.ignore_patterns("model*", "tokenizer*"))
    assert "random ones are taken" in offramp("attach", tmp_path / "bare").stderr
    assert sorted(material.iterdir()) == before


def test_a_network_that_cannot_be_cut_is_said_to_be(material: Path, tmp_path: Path) -> None:
    (material / "ofr_branch.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, classes=2):\n"
        "        super().__init__()\n"
        "        self.blocks = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])\n"
        "        self.out = nn.Linear(3, classes)\n"
        "    def forward(self, x):\n"
        "        for block in self.blocks:\n"
        "            x = block(x) if float(x.sum()) > 0 else block(x).relu()\n"
        "        return self.out(x)\n"
    )
    said = offramp("attach", "ofr_branch:Net", "--shape", "3")
    assert "cannot be" in said.stderr
    run = tmp_path / "run"
    done = offramp("train", "numbers.csv", "--model", "ofr_branch:Net", "--epochs", 1, "--out", run)
    assert "not known" in done.stderr
    offramp("record", run)
    assert ExitTrace.load(trace_path(run, "calibrate")).exits == 3
