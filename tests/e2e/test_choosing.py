"""`offramp calibrate` and `offramp compare` on committed traces: risks, both at once, pages, and wrong usage."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from offramp.calibrate import Calibration, Joint, Risk
from offramp.cli import app

TRACES = Path(__file__).parents[1] / "traces"
TRACE, COSTS = TRACES / "ag_news.safetensors", TRACES / "ag_news-costs.json"
ASKED = ("calibrate", TRACE, "--costs", COSTS, "--policy", "max-prob")
runner = CliRunner()


def offramp(*words: object, code: int = 0):
    done = runner.invoke(app, [str(word) for word in words], env={"COLUMNS": "160", "NO_COLOR": "1"})
    assert done.exit_code == code, done.output + (done.stderr or "")
    return done


def calibrate(tmp_path: Path, *words: object, code: int = 0, policy: str = "max-prob"):
    out = tmp_path / "p.json"
    done = offramp("calibrate", TRACE, "--costs", COSTS, "--policy", policy, "--out", out, "--json", *words, code=code)
    return json.loads(done.stdout), out


def test_a_risk_is_certified_and_the_promise_is_kept_in_the_file(tmp_path):
    value, out = calibrate(tmp_path, "--risk", 0.01)
    assert value["status"] == "met"
    assert "promised with 90 % confidence" in value["message"]
    promise = value["promise"]
    assert (promise["epsilon"], promise["delta"], promise["method"], promise["rows"]) == (0.01, 0.1, "ltt", 3800)
    assert promise["observed"] <= 0.01
    assert promise["bound"] <= 0.01
    found = Calibration.load(out)
    assert found.target == Risk(0.01)
    assert found.promise.rows == 3800
    assert found.achieved < 0.5


@pytest.mark.parametrize(
    ("loss", "method", "used"),
    [
        ("disagreement", "auto", "ltt"),
        ("signed drop", "auto", "betting"),
        ("drop", "crc", "crc"),
        ("drop", "plain", "plain"),
    ],
)
def test_losses_and_methods(tmp_path, loss, method, used):
    value, _ = calibrate(tmp_path, "--risk", 0.02, "--loss", loss, "--method", method)
    assert value["status"] == "met"
    assert (value["promise"]["loss"], value["promise"]["method"]) == (loss, used)


def test_a_risk_and_a_budget_at_once(tmp_path):
    value, out = calibrate(tmp_path, "--risk", 0.02, "--fraction", 0.5)
    assert value["status"] == "met"
    assert value["achieved"] <= 0.5
    assert isinstance(Calibration.load(out).target, Joint)
    safest, _ = calibrate(tmp_path, "--risk", 0.02, "--fraction", 0.5, "--prefer", "safest")
    assert 0.49 <= safest["achieved"] <= 0.5
    assert safest["promise"]["epsilon"] < value["promise"]["epsilon"]


def test_too_few_certify_rows_say_how_many_are_needed(tmp_path):
    value, out = calibrate(tmp_path, "--risk", 0.01, "--certify", few_rows(tmp_path), code=3)
    assert value["status"] == "infeasible"
    assert "even without any loss 230 are needed" in value["message"]
    assert not out.exists()


def few_rows(tmp_path: Path) -> Path:
    import torch

    from offramp import ExitTrace

    return ExitTrace.load(TRACE).select(torch.arange(100)).save(tmp_path / "few.safetensors")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prefer", "safest", "--fraction", 0.5), "--prefer belongs to a budget together with --risk"),
        (("--certify", TRACE, "--fraction", 0.5), "--certify belongs to --risk"),
        (("--risk", 0.01, "--error-rate"), "give exactly one"),
        ((), "give exactly one"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, words, message):
    done = offramp(
        "calibrate", TRACE, "--costs", COSTS, "--policy", "max-prob", "--out", tmp_path / "p.json", *words, code=2
    )
    assert message in re.sub(r"[\s│]+", " ", done.output + done.stderr)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--risk", 1.5), "epsilon is 1.5"),
        (("--risk", 0.01, "--delta", 0), "delta is 0"),
        (("--risk", 0.01, "--loss", "signed drop", "--method", "ltt"), "not valid for a signed drop"),
    ],
)
def test_numbers_out_of_range(tmp_path, words, message):
    done = offramp(
        "calibrate", TRACE, "--costs", COSTS, "--policy", "max-prob", "--out", tmp_path / "p.json", *words, code=1
    )
    assert message in done.stderr


def test_compare_splits_in_three_and_judges_on_the_third(tmp_path):
    page = tmp_path / "page.html"
    done = offramp(
        "compare", TRACE, "--costs", COSTS, "--policies", "max-prob,msdnet,beem-a", "--budgets", "0.4:0.6:0.2",
        "--risk", "0.01,0.02", "--split", "0.4,0.3,0.3", "--html", page, "--json",
    )  # fmt: skip
    value = json.loads(done.stdout)
    assert value["how"] == "fitted on 3040, certified on 2280 and judged on 2280 rows, by seed 0"
    assert len(value["rows"]) == 3 * 4
    first = value["rows"][0]
    assert (first["family"], first["difference"]) == ("max-prob", 0.0)
    assert {row["status"] for row in value["rows"]} == {"met"}
    for row in value["rows"]:
        assert row["accuracy"] <= row["accuracy"] + row["regret"] <= 1
        assert row["random"] > 0.8
    certified = [row for row in value["rows"] if "confidence" in row["target"] and row["family"] == "max-prob"]
    assert certified[0]["cost"] >= certified[1]["cost"]
    assert [row["exit"] for row in value["exits"]] == list(range(6))
    text = page.read_text(encoding="utf-8")
    assert "Policies on equal exits" in text
    assert "src=" not in text.split("<script")[0]
    assert "beem-a" in text


def test_compare_all_leaves_out_what_the_trace_has_no_signals_for(tmp_path):
    bare = bare_trace(tmp_path)
    done = offramp(
        "compare", bare, "--costs", TRACES / "rte-costs.json", "--budgets", "0.5", "--repeats", 1, "--policies", "all",
    )  # fmt: skip
    assert "berxit left out" in done.stderr
    for name in ("max-prob", "f-pabee", "eenet", "jei-dnn", "stopping", "fixed"):
        assert name in done.stdout
    assert "area under frontier" in done.stdout
    assert "right at an early exit and wrong at the end" in done.stdout


def bare_trace(tmp_path: Path) -> Path:
    from dataclasses import replace

    from offramp import ExitTrace

    trace = ExitTrace.load(TRACES / "rte.safetensors")
    return replace(trace, signals=None, signal_names=()).save(tmp_path / "bare.safetensors")


def test_shares_that_are_no_split(tmp_path):
    done = offramp("compare", TRACE, "--costs", COSTS, "--split", "0.5,0.5", code=2)
    assert "expected three shares" in re.sub(r"[\s│]+", " ", done.output + done.stderr)
