"""A run folder as the commands know it: what one writes, the next ones find. And what every command has in common."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from offramp import Bundle
from offramp.cli import app

PROGRAM = [sys.executable, "-c", "from offramp.cli import main; main()"]


def offramp(*words: object, code: int = 0):
    done = CliRunner().invoke(app, [str(word) for word in words], prog_name="offramp")
    assert done.exit_code == code, f"{done.exit_code}: {done.stdout}\n{done.stderr}\n{done.exception!r}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder") / "digits"
    offramp("train", "digits", "--epochs", 2, "--limit", 300, "--out", folder)
    return folder


def test_each_command_says_which_one_is_missing(run: Path) -> None:
    if not (run / "calibrate.safetensors").exists():
        asked = offramp("calibrate", run, "--policy", "max-prob", "--fraction", 0.5, code=1)
        assert f"Record them: offramp record {run}" in asked.stderr
    offramp("record", run)
    assert {path.name for path in run.glob("*.safetensors")} == {
        "model.safetensors", "calibrate.safetensors", "test.safetensors",
    }  # fmt: skip
    if not (run / "costs.json").exists():
        asked = offramp("calibrate", run, "--policy", "max-prob", "--fraction", 0.5, code=1)
        assert f"Measure them: offramp measure {run}" in asked.stderr
    offramp("measure", run, "--batch-sizes", "1,4")
    assert (run / "costs.json").is_file()


def test_policies_report_and_bundle_are_made_of_the_run(run: Path, tmp_path: Path) -> None:
    test_each_command_says_which_one_is_missing(run)
    said = json.loads(offramp("calibrate", run, "--policy", "max-prob", "--fraction", "0.5:0.7:0.1", "--json").stdout)
    assert [Path(row["out"]).name for row in said["policies"]] == [f"max-prob-{f}.json" for f in (0.5, 0.6, 0.7)]
    offramp("calibrate", run, "--policy", "beem-a", "--max-drop", 0.05, "--metric", "macro-f1")
    assert (run / "policies" / "beem-a-drop-0.05-macro-f1.json").is_file()
    missed = offramp("calibrate", run, "--policy", "max-prob", "--fraction", "0.01,0.6", code=3)
    assert "1 target(s) cannot be met" in missed.stderr
    assert not (run / "policies" / "max-prob-0.01.json").exists()
    table = json.loads(offramp("compare", run, "--policies", "max-prob", "--budgets", 0.6, "--json").stdout)
    assert "judged on 539 others" in table["how"]
    pytest.importorskip("plotly")
    made = offramp(
        "report", run, "--no-timing", "--policies", "max-prob,beem-a", "--budgets", "0.5,0.7", "--json",
        "--picture", tmp_path / "a.svg",
    )  # fmt: skip
    value = json.loads(made.stdout)
    assert "(counted, not timed)" in value["headline"] or value["headline"].startswith("No policy keeps")
    assert len(value["report"]["examples"]) > 4
    assert value["report"]["examples"][0]["image"].startswith("data:image/png")
    assert {part["rows"] for part in value["report"]["parts"]} >= {300, 360, 539}
    assert (tmp_path / "a.svg").stat().st_size > 1000
    offramp("bundle", "create", run, "--out", tmp_path / "d.offramp", "--no-timing", "--default", "max-prob-0.6")
    assert "is good" in offramp("bundle", "verify", tmp_path / "d.offramp").stdout
    bundle = Bundle.load(tmp_path / "d.offramp")
    assert bundle.default == "max-prob-0.6"
    assert set(bundle.policies["max-prob-0.5"].tested) >= {"accuracy", "low", "high", "plain", "cost", "rows"}
    assert "max-prob-0.6, tested" in offramp("inspect", tmp_path / "d.offramp").stdout
    assert "does not say how rows become inputs" in offramp("predict", tmp_path / "d.offramp", "text", code=1).stderr


def test_live_timing_makes_plain_the_default_where_nothing_pays(run: Path, tmp_path: Path) -> None:
    test_each_command_says_which_one_is_missing(run)
    # a policy that visits every exit and never leaves cannot be faster than the plain model by more than chance
    from offramp import MaxProb, dumps

    (tmp_path / "never.json").write_text(dumps(MaxProb((2.0, 2.0, 2.0))))
    made = offramp(
        "bundle", "create", run, "--out", tmp_path / "n.offramp", "--policy", tmp_path / "never.json", "--json"
    )
    value = json.loads(made.stdout)
    pays = value["tested"]["never"]["speedup"]["times"] > 1
    assert value["default"] == ("never" if pays else "plain")
    assert "times as fast as plain" in made.stderr


def test_quiet_leaves_warnings_and_errors_alone(run: Path) -> None:
    test_each_command_says_which_one_is_missing(run)
    assert offramp("--quiet", "measure", run, "--batch-sizes", 1).stderr == ""
    assert offramp("-q", "record", run, "--split", "test").stderr == ""
    assert "error" in offramp("-q", "inspect", run / "nothing", code=1).stderr
    offramp("inspect", run)  # and it is off again


def test_a_mistake_of_ours_is_said_to_be_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> dict[str, object]:
        raise KeyError("left over")

    monkeypatch.setattr("offramp.cli.answers.holds", broken)
    told = offramp("inspect", run, code=70).stderr
    assert "KeyError" in told
    assert "mistake in Offramp" in told
    debug = CliRunner().invoke(app, ["--debug", "inspect", str(run)])
    assert isinstance(debug.exception, KeyError)


def test_completion_answers_at_once_and_knows_the_commands() -> None:
    names = {"_OFFRAMP_COMPLETE": "complete_bash", "COMP_WORDS": "offramp re", "COMP_CWORD": "1"}
    code = "import sys; sys.argv[0] = 'offramp'; from offramp.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **names})
    assert done.stdout.split() == ["record", "report"]
