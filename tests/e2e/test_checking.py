"""`offramp check` of a small run and its bundle: rows of the same kind, shifted ones, and what cannot be used."""

import csv
import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from offramp import Bundle, ExitTrace
from offramp.cli import app
from offramp.runs import held_out, trace_path
from own_material import MODULE, numbers

BOLD = 0.7  # what a policy may spend: more than the first exit alone costs here


def offramp(*words: object, code: int = 0):
    done = CliRunner().invoke(app, [str(word) for word in words], prog_name="offramp")
    assert done.exit_code == code, f"{done.exit_code}: {done.stdout}\n{done.stderr}\n{done.exception!r}"
    assert "Traceback" not in done.stderr
    return done


def rows(path: Path, count: int, scale: float, seed: int = 1) -> Path:
    """A CSV without labels; a smaller scale brings rows nearer to where the classes meet."""
    draw = random.Random(seed)
    with open(path, "w", newline="", encoding="utf-8") as file:
        write = csv.writer(file)
        write.writerow(["a", "b", "c"])
        write.writerows([scale * draw.gauss(0, 1) for _ in range(3)] for _ in range(count))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run, bundle and rows, in which the tests of this file work."""
    place = tmp_path_factory.mktemp("check")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        (place / "ofr_checknet.py").write_text(MODULE)
        numbers(place / "numbers.csv", rows=900)
        offramp("train", "numbers.csv", "--model", "ofr_checknet:mlp", "--epochs", 3, "--out", "run")
        offramp("record", "run")
        offramp("measure", "run", "--batch-sizes", 1)
        offramp("calibrate", "run", "--policy", "max-prob", "--fraction", BOLD)
        offramp("calibrate", "run", "--policy", "patience", "--fraction", BOLD)
        offramp("bundle", "create", "run", "--out", "b.offramp", "--no-timing", "--default", f"max-prob-{BOLD}")
    rows(place / "same.csv", 150, 1.0)
    rows(place / "hard.csv", 150, 0.15)
    rows(place / "few.csv", 3, 1.0)
    return place


@pytest.fixture(autouse=True)
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_rows_of_the_same_kind_shifted_ones_and_too_few() -> None:
    done = offramp("check", "b.offramp", "same.csv")
    assert f"max-prob-{BOLD}: same. No shift was seen in 150 rows" in done.stdout
    assert "exit shares" in done.stdout
    assert "max-prob at exit 1" in done.stdout
    value = json.loads(offramp("check", "b.offramp", "hard.csv", "--json", code=4).stdout)
    assert value["verdict"] == "shifted"
    assert value["cost_after"] > value["cost_before"]
    assert sum(value["shares_after"]) == pytest.approx(1.0)
    assert value["cost_holds"] is False
    assert offramp("-q", "check", "b.offramp", "few.csv", code=5).stderr == ""


def test_a_run_and_its_bundle_say_the_same_and_traces_are_read(folder: Path) -> None:
    ofbundle = json.loads(offramp("check", "b.offramp", "hard.csv", "--json", code=4).stdout)
    ofrun = json.loads(offramp("check", "run", "hard.csv", "--policy", f"max-prob-{BOLD}", "--json", code=4).stdout)
    assert ofrun["shares_after"] == ofbundle["shares_after"]
    assert ofrun["shares_before"] == ofbundle["shares_before"]
    fit, test = (trace_path("run", split) for split in held_out("run"))
    for target in ("run", "b.offramp"):
        value = json.loads(offramp("check", target, test, "--policy", f"max-prob-{BOLD}", "--json").stdout)
        assert value["verdict"] == "same"
        assert value["rows"] == ExitTrace.load(test).rows
        assert value["reference_rows"] == ExitTrace.load(fit).rows


def test_thresholds_are_moved_and_what_is_lost_is_said() -> None:
    done = offramp("check", "b.offramp", "hard.csv", "--recalibrate", "--out", "moved.json", code=4)
    assert "accuracy promises do not carry over" in done.stderr
    assert "wrote moved.json" in done.stdout
    assert "labelled rows" in offramp("inspect", "moved.json").stdout
    offramp("predict", "b.offramp", "hard.csv", "--policy", "moved.json")
    value = json.loads(
        offramp("check", "run", "hard.csv", "--policy", f"max-prob-{BOLD}", "--recalibrate", "--out", "m.json",
                "--json", code=4).stdout
    )  # fmt: skip
    assert value["recalibrated"]["cost"] <= BOLD * (1 + 1e-9)
    told = offramp(
        "check", "run", "hard.csv", "--policy", f"patience-{BOLD}", "--recalibrate", "--out", "p.json", code=1
    )
    assert "Patience has no threshold per exit to move" in told.stderr
    assert not Path("p.json").exists()


def test_a_bundle_without_a_reference_asks_for_the_trace() -> None:
    import dataclasses

    bundle = Bundle.load("b.offramp")
    old = {name: dataclasses.replace(choice, reference=None) for name, choice in bundle.policies.items()}
    bundle.with_policies(old).save("old.offramp")
    told = offramp("check", "old.offramp", "same.csv", code=1)
    assert "--against" in told.stderr
    fit = trace_path("run", held_out("run")[0])
    value = json.loads(offramp("check", "old.offramp", "same.csv", "--against", fit, "--json").stdout)
    known = json.loads(offramp("check", "b.offramp", "same.csv", "--json").stdout)
    assert [value[name] for name in ("verdict", "shares_before", "cost_after")] == [
        known[name] for name in ("verdict", "shares_before", "cost_after")
    ]


def test_what_cannot_be_checked_is_told() -> None:
    assert "go together" in offramp("check", "b.offramp", "same.csv", "--recalibrate", code=2).stderr
    assert "--level" in offramp("check", "b.offramp", "same.csv", "--level", 0, code=2).stderr
    assert "--policy is 'x'" in offramp("check", "b.offramp", "same.csv", "--policy", "x", code=2).stderr
    Path("bad.csv").write_text("a,b,c\n1,2,3\n1,two,3\n")
    assert "line 3" in offramp("check", "b.offramp", "bad.csv", code=1).stderr
    Path("none.csv").write_text("a,b,c\n")
    assert "row" in offramp("check", "b.offramp", "none.csv", code=1).stderr
    assert "does not exist" in offramp("check", "b.offramp", "nothing.csv", code=1).stderr
