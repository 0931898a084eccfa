"""The tree of commands, and command lines as the documentation writes them."""

import re
import shlex

from typer.main import get_command

from offramp.cli import app


def commands() -> dict[str, object]:
    """Every command by its words; those of a group have two."""
    found: dict[str, object] = {}
    for name, command in get_command(app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name} {word}": each for word, each in inner.items()} if inner else {name: command}
    return found


def check(words: list[str]) -> None:
    """Nothing; fails when the program would refuse these words as wrong usage."""
    known = commands()
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in known:
            known[name].make_context(f"offramp {name}", words[length:]).close()
            return
    get_command(app).make_context("offramp", list(words)).close()


def written(block: str) -> list[list[str]]:
    """The words of every `offramp ...` in a block for a shell, without pipes, redirections, variables and comments."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if not re.fullmatch(r"[|&;<>()]+", word):
                command.append(word)
                continue
            while command and re.fullmatch(r"\w+=.*", command[0]):
                command.pop(0)
            if command and command[0].rpartition("/")[2] == "offramp":
                found.append(command[1:])
            command = [""] if set(word) & set("<>") else []  # what follows is a file's name
    return found
