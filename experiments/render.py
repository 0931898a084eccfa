"""The tables and pictures of docs/results.md, and the README's table of tokens, from the JSON files under results/ and
from nothing else.

    python -m experiments.render                # or: make results
    python -m experiments.render --check        # says what differs and writes nothing

What stands between `<!-- made: NAME -->` and `<!-- until here -->` is made anew; what is not measured yet is said so.
"""

import argparse
import re
from collections.abc import Callable

from experiments.beem import page as beem
from experiments.eenet import page as eenet
from experiments.page import NOTHING, ROOT, grid
from experiments.tokens import page as tokens

from offramp.artefacts import write_atomically

PAGE, PICTURES = ROOT / "docs" / "results.md", ROOT / "docs" / "results"
PAGES = (PAGE, ROOT / "README.md")
BLOCK = re.compile(r"(<!-- made: ([\w-]+) -->\n).*?(<!-- until here -->)", flags=re.DOTALL)


def times(_: str) -> list[str]:
    """How long the trainings took."""
    rows = [*beem.hours(), *eenet.hours()]
    return grid(["task", "trainings", "in all", "machine"], rows) if rows else NOTHING


BLOCKS: dict[str, Callable[[str], list[str]]] = {
    "networks": beem.networks, "fewer": beem.fewer, "beem": beem.beem, "near": beem.near, "static": beem.static,
    "budgets": beem.budgets, "recipes": beem.recipes, "speed": beem.speed, "eenet": eenet.eenet, "checks": eenet.checks,
    "times": times, "tokens": tokens.tokens, "tokenspeed": tokens.token_speed, "heads": tokens.heads,
    "highlights": tokens.highlights, "parity": tokens.parity,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = rendered(before)
        if options.check and before != after:
            raise SystemExit(f"{page} is not what results/ gives: run python -m experiments.render")
        if not options.check:
            write_atomically(page, lambda path, text=after: path.write_text(text, encoding="utf-8"))
            print(f"wrote {page}")
    if options.check:
        return
    for path in beem.drawn(PICTURES):
        print(f"wrote {path}")


def rendered(page: str) -> str:
    """The page with every block made anew."""

    def made(match: re.Match[str]) -> str:
        name, _, what = match[2].partition("-")
        return f"{match[1]}\n{chr(10).join(BLOCKS[name](what))}\n\n{match[3]}"

    return BLOCK.sub(made, page)


if __name__ == "__main__":
    main()
