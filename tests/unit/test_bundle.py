"""Bundles: what is written is what runs, nothing of it is code, and what is damaged is said to be."""

import builtins
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bundles import LABELS, bundle, network, saved
from safetensors.torch import load_file, save_file
from torch import nn

import offramp
from offramp.bundle import PLAIN, Bundle, Choice
from offramp.bundle.store import MANIFEST, _seal
from offramp.errors import DataError, FormatError, NotStageable, ValueRangeError

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("bundle"))


def rows(count: int) -> list[dict[str, float]]:
    values = torch.randn(count, 6, generator=torch.Generator().manual_seed(count))
    return [{f"c{i}": float(value) for i, value in enumerate(row)} for row in values]


def test_a_bundle_answers_as_the_model_does(folder: Path) -> None:
    ours, theirs = bundle(), Bundle.load(folder)
    x = torch.randn(37, 6)
    with torch.inference_mode():
        assert torch.equal(theirs.model(x), ours.model(x))
        assert torch.equal(theirs.model.plain(x), ours.model.plain(x))
    for name in ours.names:
        a, b = ours.runtime(name)(x), theirs.runtime(name)(x)
        assert torch.equal(a.probabilities, b.probabilities)
        assert torch.equal(a.exit, b.exit)
    assert theirs.labels == LABELS
    assert theirs.about == {"made": "by a test"}
    assert theirs.costs == ours.costs
    assert theirs.policies == ours.policies
    assert set(ours.runtime(PLAIN)(x).exit.tolist()) == {2}


def test_raw_rows_are_answered(folder: Path) -> None:
    found = list(Bundle.load(folder).predict(rows(10), batch_size=3))
    assert [answer.row for answer in found] == list(range(10))
    assert {answer.label for answer in found} <= set(LABELS)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    there = list(Bundle.load(folder).predict(rows(10), batch_size=3, engine="onnx", threads=1))
    assert [(answer.label, answer.exit) for answer in there] == [(answer.label, answer.exit) for answer in found]
    with pytest.raises(DataError, match="row 4: its 'c2' is 'many'"):
        list(Bundle.load(folder).predict([*rows(4), {**rows(1)[0], "c2": "many"}]))


def test_policies_are_chosen_by_name_and_by_budget(folder: Path) -> None:
    found = Bundle.load(folder)
    assert found.names == ("max-prob-0.5", "max-prob-0.8", "plain")
    assert found.choose()[0] == "max-prob-0.5"
    assert found.choose(budget=offramp.Budget(fraction=0.9))[0] == "max-prob-0.8"
    assert found.choose(budget=offramp.Budget(fraction=0.55))[0] == "max-prob-0.5"
    with pytest.raises(ValueRangeError, match="no policy of the bundle is known to keep"):
        found.choose(budget=offramp.Budget(fraction=0.1))
    with pytest.raises(ValueRangeError, match="no policy 'fast'; expected one of max-prob-0.5"):
        found.choose("fast")


def test_a_policy_is_swapped_without_the_model_being_written_again(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    found = Bundle.load(path).with_policies({"other": Choice(offramp.Entropy(0.3))})
    found.save(path)
    after = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    kept = [name for name in before if name.startswith(("weights", "programs", "example", "costs"))]
    assert len(kept) == 4
    assert all(after[name] == before[name] for name in kept)
    assert not [name for name in after if "max-prob" in name]
    assert Bundle.load(path).names == ("other", PLAIN)


def test_files_can_be_read_by_others(folder: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666 & ~mask}


def test_loading_runs_nothing_of_the_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No unpickling, no torch.load, no eval; what Python generates is for graphs that were checked."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("code")

    for where, name in (
        (pickle, "loads"),
        (pickle, "load"),
        (torch, "load"),
        (builtins, "eval"),
        (torch.export, "load"),
    ):
        monkeypatch.setattr(where, name, never)
    assert Bundle.load(folder).names


def altered(folder: Path, tmp_path: Path, role: str, change) -> Path:
    """A copy of a bundle in which a file was changed by someone who mended all checksums."""
    path = tmp_path / "evil.offramp"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(folder, path)
    value = json.loads((path / MANIFEST).read_text())
    entry = value["files"][role]
    file = path / entry["name"]
    change(file)
    data = file.read_bytes()
    import hashlib

    entry["sha256"], entry["size"] = hashlib.sha256(data).hexdigest(), len(data)
    value["sha256"] = _seal(value)
    (path / MANIFEST).write_text(json.dumps(value))
    return path


def edited(change):
    def edit(file: Path) -> None:
        value = json.loads(file.read_text())
        change(value)
        file.write_text(json.dumps(value))

    return edit


def set_call(call: list[object]):
    return edited(lambda value: value["stages"][0]["nodes"].__setitem__(0, call))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (["os.system", ["touch pwned"]], "no operator that a bundle may hold"),
        (["builtins.eval.default", ["1"]], "no operator that a bundle may hold"),
        (["aten.from_file.default", ["/etc/passwd", False, 10]], "does more than compute"),
        (["aten.relu_.default", [{"v": 0}]], "does more than compute"),
        (["aten.set_.default", [{"v": 0}]], "does more than compute"),
        (["aten.__class__.default", [{"v": 0}]], "no operator|does more"),
        (["aten._unsafe_index.Tensor", [{"v": 0}, []]], "does more than compute"),
        (["aten.relu.default", [{"v": 99}]], "has the argument"),
        (["aten.relu.default", [{"v": 0}], {"out": {"v": 0}}], "arguments that it does not have"),
        (["aten.relu.default", [{"call": "x"}]], "has the argument"),
        (["aten.zeros.default", [[10**12]]], "do not run on its own example|damaged"),
        (["getitem", [{"v": 0}, "a"]], "getitem takes"),
        (["aten.mm.default", [{"v": 0}, {"v": 0}]], "do not run on its own example"),
        ([], "damaged"),
        (7, "damaged"),
    ],
)
def test_a_program_is_made_of_operators_that_only_compute(folder: Path, tmp_path: Path, call, said: str) -> None:
    path = altered(folder, tmp_path, "programs", set_call(call))
    with pytest.raises(FormatError, match=said):
        Bundle.load(path)
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v["stages"][0].__setitem__("sizes", ["__import__('os').system('x')"]), "a size is"),
        (lambda v: v["stages"].pop(), "stages"),
        (lambda v: v["heads"].pop(), "heads"),
        (lambda v: v.__setitem__("classes", 1), "classes"),
        (lambda v: v["stages"][1]["enters"].clear(), "damaged|inputs"),
        (lambda v: v["inputs"][0].__setitem__("dtype", "object"), "no dtype"),
        (lambda v: v["stages"][0]["weights"].__setitem__(0, "nowhere"), "do not hold 'nowhere'"),
        (lambda v: v.__setitem__("taps", None), "damaged"),
        (lambda v: v.__setitem__("ranges", [[0]]), "damaged"),
    ],
)
def test_programs_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, change, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        Bundle.load(altered(folder, tmp_path, "programs", edited(change)))


def test_other_weights_are_noticed_by_the_answers(folder: Path, tmp_path: Path) -> None:
    def change(file: Path) -> None:
        save_file({name: tensor + 0.5 for name, tensor in load_file(file).items()}, file)

    with pytest.raises(FormatError, match="answers otherwise here"):
        Bundle.load(altered(folder, tmp_path, "weights", change))


def test_damage_is_named(folder: Path, tmp_path: Path) -> None:
    def copy() -> Path:
        path = tmp_path / "copy.offramp"
        shutil.rmtree(path, ignore_errors=True)
        return Path(shutil.copytree(folder, path))

    def file_of(path: Path, stem: str) -> Path:
        return next(file for file in path.iterdir() if file.name.startswith(stem))

    path = copy()
    file_of(path, "weights").unlink()
    with pytest.raises(FormatError, match="incomplete: weights"):
        Bundle.load(path)
    path = copy()
    weights = file_of(path, "weights")
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(FormatError, match="is truncated"):
        Bundle.load(path)
    path = copy()
    programs = file_of(path, "programs")
    programs.write_bytes(programs.read_bytes().replace(b"relu", b"gelu"))
    with pytest.raises(FormatError, match="checksum is not the manifest's"):
        Bundle.load(path)
    path = copy()
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace("perhaps", "perhapz"))
    with pytest.raises(FormatError, match="does not have its own checksum"):
        Bundle.load(path)
    (path / MANIFEST).write_text(json.dumps({**json.loads(text), "version": 2}))
    with pytest.raises(FormatError, match=r"version 2; this Offramp reads 1. Update"):
        Bundle.load(path)
    (path / MANIFEST).write_text(json.dumps({**json.loads(text), "kind": "other"}))
    with pytest.raises(FormatError, match="of kind 'other'"):
        Bundle.load(path)
    (path / MANIFEST).unlink()
    with pytest.raises(FormatError, match="is no bundle"):
        Bundle.load(path)
    with pytest.raises(FormatError, match="does not exist"):
        Bundle.load(tmp_path / "nowhere")


def test_a_name_cannot_leave_the_folder(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.offramp"
    shutil.copytree(folder, path)
    value = json.loads((path / MANIFEST).read_text())
    for name in ("../secret.0123456789ab.json", "/etc/passwd", "a/b.0123456789ab.json", ".hidden.0123456789ab"):
        value["files"]["programs"]["name"] = name
        value["sha256"] = _seal(value)
        (path / MANIFEST).write_text(json.dumps(value))
        with pytest.raises(FormatError, match="list of files is not one"):
            Bundle.load(path)


def test_bytes_turned_anywhere_give_one_error(folder: Path, tmp_path: Path) -> None:
    dice = random.Random(0)
    files = sorted(file.name for file in folder.iterdir())
    for _ in range(150):
        path = tmp_path / "m.offramp"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(folder, path)
        file = path / dice.choice(files)
        data = bytearray(file.read_bytes())
        for _ in range(dice.randint(1, 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        changed = bytes(data[: dice.randrange(len(data))] if dice.random() < 0.3 else data)
        if changed == file.read_bytes():
            continue
        file.write_bytes(changed)
        with pytest.raises(FormatError):
            Bundle.load(path)


def test_what_cannot_be_bundled_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Half(nn.Module):
        def forward(self, x):
            return x * 0.5

    parts = [nn.Linear(6, 6), Half(), nn.Linear(6, 3)]
    whole = nn.Sequential(*parts)
    by_hand = offramp.attach(whole, at=("0",), example=torch.randn(2, 6), stages=[parts[0], nn.Sequential(*parts[1:])])
    with pytest.raises(NotStageable, match="given by hand"):
        Bundle(by_hand, labels=LABELS).save(tmp_path / "x")
    model = offramp.attach(network(), at=("0",), example=torch.randn(2, 6))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(FormatError, match="holds no bundle"):
        Bundle(model, labels=LABELS).save(tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    with pytest.raises(ValueRangeError, match="2 different labels; expected 3"):
        Bundle(model, labels=("a", "b"))
    with pytest.raises(ValueRangeError, match="a policy is called 'plain'"):
        Bundle(model, labels=LABELS, policies={"plain": Choice(offramp.MaxProb(0.5))})


SAVER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tempfile import TemporaryDirectory
from bundles import saved
from offramp.bundle import Bundle
with TemporaryDirectory() as scratch:  # read ones are saved in milliseconds, so that a kill meets a save
    made = [Bundle.load(saved(Path(scratch) / str(seed), seed)) for seed in (0, 1)]
print("ready", flush=True)
while True:
    for each in made:
        each.save(Path(sys.argv[2]) / "small.offramp")
"""


def test_a_killed_save_leaves_a_whole_bundle(tmp_path: Path) -> None:
    saved(tmp_path)
    answers = [bundle(seed).model.plain(torch.ones(1, 6)) for seed in (0, 1)]
    dice = random.Random(1)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(HERE), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        time.sleep(0.1 + 0.4 * dice.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = Bundle.load(tmp_path / "small.offramp").model.plain(torch.ones(1, 6))
        assert any(torch.equal(found, answer) for answer in answers)
    saved(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["small.offramp"]
    assert not [path for path in (tmp_path / "small.offramp").iterdir() if path.name.startswith(".")]
