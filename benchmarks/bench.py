"""`make bench`: `offramp bench` of a run, the digits unless another is named, with the figures in results/.

make bench                                       # digits, trained first if need be
make bench ARGS="runs/sst2 --data DATA"          # any run; `offramp bench --help` has the options
"""

import sys
from pathlib import Path

from offramp.cli import app
from offramp.quickstart import quickstart

DIGITS = "runs/digits"


def main() -> None:
    """Runs the command on the words behind the script's name."""
    words = sys.argv[1:]
    if not words or words[0].startswith("-"):
        words = [DIGITS, *words]
    if words[0] == DIGITS and not (Path(DIGITS) / "run.json").exists():
        quickstart("digits", out=DIGITS)
    if "--out" not in words:
        words += ["--out", f"results/engines-{Path(words[0]).name}.json"]
    app(["bench", *words], prog_name="offramp")


if __name__ == "__main__":
    main()
