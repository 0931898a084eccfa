import re

import pytest
from commands import check, commands, written
from typer.testing import CliRunner

from offramp.cli import app
from offramp.cli.options import Family, Gradients, Loss, Metric, Task, objective_of
from offramp.cli.reporting import HEADLINE as PAGE_FAMILIES
from offramp.compare import CHOICES, HEADLINE
from offramp.jobs import JOBS
from offramp.metrics import METRICS
from offramp.objectives import Objective
from offramp.recipe import CHOICES as CHOICES_OF_RECIPES

run = CliRunner()
NAMES = [
    *(
        "quickstart",
        "attach",
        "train",
        "certainty",
        "record",
        "measure",
        "calibrate",
        "compare",
        "check",
        "bench",
        "predict",
        "generate",
        "caption",
        "export",
        "report",
        "inspect",
    ),
    *("bundle create", "bundle verify"),
]


def test_the_commands_are_exactly_these() -> None:
    assert list(commands()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_help_has_an_example_that_parses_and_json(name: str) -> None:
    shown = run.invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    assert "--json" in shown.stdout
    example = re.search(r"Example: (.*)", shown.stdout)
    assert example, shown.stdout
    (words,) = written(example[1].strip())
    assert " ".join(words).startswith(name)
    check(words)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_help_text(name: str) -> None:
    for option in commands()[name].params:
        assert option.help, f"{name} {option.name}"


def test_names_are_those_of_python() -> None:
    assert tuple(t.value for t in Task) == JOBS
    assert tuple(f.value for f in Family) == tuple(CHOICES)
    assert tuple(m.value for m in Metric) == METRICS
    assert tuple(g.value for g in Gradients) == CHOICES_OF_RECIPES["gradients"]
    assert tuple(PAGE_FAMILIES.split(",")) == HEADLINE
    assert all(isinstance(objective_of(loss), Objective) for loss in Loss)


def test_help_of_the_program() -> None:
    shown = run.invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert all(name.split()[0] in shown.stdout for name in NAMES)
    assert "Examples: offramp" in shown.stdout
    assert "--install-completion" in shown.stdout


def test_version() -> None:
    shown = run.invoke(app, ["--version"])
    assert re.fullmatch(r"offramp \d+\.\d+\.\d+\n", shown.stdout)
    assert shown.exit_code == 0
