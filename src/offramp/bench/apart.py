"""An engine in a process of its own: its memory is its own, and when it dies the others go on.

The parent writes one line of JSON, what to bench, to standard input; the child writes facts and cells as JSON lines to
standard output. What packages print there goes to standard error, whose last line is the reason when the child dies.
Standard input stays open while the parent lives: a child whose parent was killed ends at once.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from offramp.bench.cells import bench_engine
from offramp.bench.plan import Pair, Plan, Subject
from offramp.bench.value import Cell, EngineFacts, cell_of, facts_of
from offramp.errors import OfframpError

__all__ = ["Opener", "bench_apart", "main"]

INTERRUPTED = 130


@dataclass(frozen=True)
class Opener:
    """What opens the subject, here and in another process.

    Args:
        function: "package.module:name"; it gives a `Subject`.
        arguments: JSON values that it is called with by name.
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Subject:
        """The subject."""
        module, _, name = self.function.partition(":")
        made: Subject = getattr(import_module(module), name)(**self.arguments)
        return made


def bench_apart(
    opener: Opener,
    plan: Plan,
    pair: Pair,
    own: str,
    done: Collection[tuple[str, int]],
    tell: Callable[[EngineFacts | Cell], None],
) -> None:
    """Nothing; what `bench_engine` tells came from a process that has gone. One that dies is told with the reason.

    Args:
        own: the model's own precision, by which an engine that dies at once is called.
    """
    request = {
        "opener": dataclasses.asdict(opener), "plan": dataclasses.asdict(plan),
        "pair": [pair.engine, pair.precision], "own": own, "done": [list(each) for each in done],
    }  # fmt: skip
    facts = EngineFacts(pair.engine, pair.precision or own)
    words = [sys.executable, "-c", "from offramp.bench.apart import main; main()"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise:
        child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, text=True)
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once; why, its standard error says
                child.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
                child.stdin.flush()  # type: ignore[union-attr]
            for line in child.stdout:  # type: ignore[union-attr]
                value = json.loads(line)
                if "cell" in value:
                    tell(cell_of(value["cell"]))
                else:
                    facts = facts_of(value["facts"])
                    tell(facts)
            child.wait()  # it ends by itself once all is told
        finally:
            if child.poll() is None:
                child.kill()
            child.communicate()
        if child.returncode == INTERRUPTED:
            raise KeyboardInterrupt
        if child.returncode:
            tell(dataclasses.replace(facts, why=_why(child.returncode, noise)))


def _why(code: int, noise: Any) -> str:
    noise.seek(0)
    last = next((line.strip() for line in reversed(noise.read().splitlines()) if line.strip()), "it said nothing")
    died = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"its process {died}: {last[:200]}"


def main() -> None:
    """Nothing; the process that `bench_apart` started ends with code 0 when everything was told."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what packages print is no result

    def tell(found: EngineFacts | Cell) -> None:
        kind = "cell" if isinstance(found, Cell) else "facts"
        out.write(json.dumps({kind: dataclasses.asdict(found)}) + "\n")
        out.flush()

    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pair = Pair(*request["pair"])
    try:
        subject = Opener(**request["opener"])()
        bench_engine(subject, Plan(**request["plan"]), pair, {(name, size) for name, size in request["done"]}, tell)
    except OfframpError as error:
        tell(EngineFacts(pair.engine, pair.precision or request["own"], why=str(error)))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _end_with_parent() -> None:
    """Nothing; the process ends where its standard input does."""
    sys.stdin.read()
    os._exit(INTERRUPTED)
