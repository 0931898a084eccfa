"""A hook of mkdocs: the page of commands is made from the program's own help."""

import re
import subprocess
import sys

MARK = "<!-- commands -->"


def on_page_markdown(markdown, **_):
    """The page, with every command's help where the mark stands; `no-run` behind a fence is for our tests alone."""
    markdown = re.sub(r"^(```\w+) no-run$", r"\1", markdown, flags=re.MULTILINE)
    if MARK not in markdown:
        return markdown
    words = [sys.executable, "-m", "typer", "offramp.cli.app", "utils", "docs", "--name", "offramp"]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return markdown.replace(MARK, text.replace("# `offramp`", "## `offramp`", 1))
