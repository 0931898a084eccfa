"""`bench`: every engine, one after the other; what is finished is kept in a file and not measured again."""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from offramp.artefacts import read_json, write_json
from offramp.bench.apart import Opener, bench_apart
from offramp.bench.cells import bench_engine, sizes_to
from offramp.bench.plan import Pair, Plan, Subject, pairs_of
from offramp.bench.value import Bench, Cell, EngineFacts
from offramp.checkpoints import named_tensors
from offramp.errors import FormatError
from offramp.machine import alternate, machine_line, threads, versions, waiter
from offramp.meter import Meter
from offramp.record import to_device
from offramp.units import precision_of

__all__ = ["Work", "bench", "left_to_do"]

LOADING_S, EXPORTING_S = 15.0, 20.0  # for a network such as MiniLM


@dataclass(frozen=True)
class Work:
    """What is still to be measured.

    Args:
        bench: what is known.
        cells: how many are wanted in all, and how many of them are known.
        seconds: about so long for the others; compiling, where the cache has no code, comes on top.
    """

    bench: Bench
    cells: tuple[int, int]
    seconds: float


def left_to_do(subject: Subject, plan: Plan, out: str | Path | None = None) -> Work:
    """What a bench still has to measure, and about how long that takes; nothing is measured but the plain model.

    Raises:
        ValueRangeError, DataError: the plan does not fit the subject.
        FormatError: the file holds something else, or a bench with other settings.
    """
    subject.check(plan)
    known = _known(subject, plan, out)
    own = precision_of(subject.model)
    missing = {pair: _missing(known, pair, plan, own) for pair in pairs_of(plan.engines)}
    wanted = len(missing) * len(plan.policies) * len(plan.batch_sizes)
    left = sum(map(len, missing.values()))
    return Work(known, (wanted, wanted - left), _estimate(subject, plan, missing) if left else 0.0)


def bench(
    subject: Subject,
    plan: Plan | None = None,
    *,
    opener: Opener | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Bench:
    """Speed, latency, accuracy and memory of engines with exits, and of what one would use instead.

    In every cell the live run, the same engine's whole model, torch eager, a run that visits every exit and takes none,
    and the model cut short at an exit that is as right take turns over the same batches of real rows.

    Args:
        subject: the model and its rows.
        plan: what to measure; every engine unless given. An engine that cannot run has facts that say why.
        opener: opens the same subject; each engine then has a process of its own, which is the clean way to tell its
            memory. Without it all engines share this process.
        out: a JSON file that every finished cell is written to at once. Cells that it has, measured with the same
            settings, are not measured again.
        progress: a bar on standard error.

    Raises:
        ValueRangeError, DataError: the plan does not fit the subject.
        FormatError: `out` holds something else, or a bench with other settings.
    """
    plan = plan or Plan()
    subject.check(plan)
    book = _Book(_known(subject, plan, out), out)
    plan = replace(plan, threads=plan.threads or torch.get_num_threads())
    own, pairs = precision_of(subject.model), pairs_of(plan.engines)
    missing = {pair: _missing(book.bench, pair, plan, own) for pair in pairs}
    steps = sum(len(cells) + 1 for cells in missing.values() if cells)
    with Meter("bench", steps, show=progress) as meter:
        for pair, cells in missing.items():
            if not cells:
                continue
            meter.line(f"{pair.named(own)}: {len(cells)} cells")
            done = {(name, size) for name in plan.policies for size in plan.batch_sizes} - cells
            seen = _Seen(book, meter, pair.named(own))
            if opener is None:
                bench_engine(subject, plan, pair, done, seen)
            else:
                bench_apart(opener, plan, pair, own, done, seen)
            seen.finish(len(cells) + 1)
    return book.bench


class _Book:
    """What is known so far, and the file that keeps it."""

    def __init__(self, bench: Bench, out: str | Path | None) -> None:
        self.bench, self.out = bench, out

    def add(self, found: EngineFacts | Cell) -> None:
        """Nothing; the file has it."""
        known = self.bench
        if isinstance(found, Cell):
            self.bench = replace(known, cells=(*known.cells, found))
        else:
            others = tuple(each for each in known.engines if each.name != found.name)
            before = next((each for each in known.engines if each.name == found.name), None)
            self.bench = replace(known, engines=(*others, found if before is None else found.beside(before)))
        if self.out is not None:
            write_json(self.out, self.bench.to_dict())


class _Seen:
    """What an engine tells: kept, and counted on the bar."""

    def __init__(self, book: _Book, meter: Meter, name: str) -> None:
        self.book, self.meter, self.name, self.steps = book, meter, name, 0

    def __call__(self, found: EngineFacts | Cell) -> None:
        self.book.add(found)
        if isinstance(found, EngineFacts) and found.why:
            self.meter.line(f"{found.name}: {found.why}")
            return
        self.steps += 1
        after = f" {found.policy} at batch {found.batch_size}" if isinstance(found, Cell) else " is ready"
        self.meter.advance(f"{self.name}{after}")

    def finish(self, steps: int) -> None:
        """Nothing; the bar stands where the next engine begins, also when this one could not run."""
        for _ in range(steps - self.steps):
            self.meter.advance()


def _known(subject: Subject, plan: Plan, out: str | Path | None) -> Bench:
    """What the file has, or a bench without cells."""
    with threads(plan.threads):
        machine, count = machine_line(), torch.get_num_threads()
    settings = {
        "fraction": plan.fraction, "thin": plan.thin, "rows": plan.timed_rows(0), "seconds": plan.seconds,
        "stage_seconds": plan.for_stages_s,
        "calls": plan.calls, "threads": count, "judged": len(subject.test),
        "fitted": 0 if subject.fit is None else len(subject.fit), "model": _mark(subject),
    }  # fmt: skip
    named = {f"policy {name}": _short(repr(subject.named[name])) for name in plan.policies if name in subject.named}
    empty = Bench(subject.title, machine, _versions(), settings | named)
    if out is None or not Path(out).exists():
        return empty
    try:
        found = Bench.of(read_json(out))
    except FormatError as error:
        raise FormatError(f"{out} cannot be gone on with: {error} Give another file, or remove it.") from None
    pairs: list[tuple[str, Any, Any]] = [
        ("machine", found.machine, machine),
        ("versions", found.versions, empty.versions),
    ]
    pairs += [(name, found.settings.get(name), value) for name, value in settings.items()]
    pairs += [(name, found.settings.get(name, value), value) for name, value in named.items()]  # others may join
    for name, before, now in pairs:
        if before != now:
            raise FormatError(
                f"{out} holds a bench with another {name} ({before}; this one has {now}), and its cells would not "
                "compare. Give another file, or remove it."
            )
    return replace(found, settings={**found.settings, **named})


def _mark(subject: Subject) -> str:
    """By which a model and its rows are known again."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors(subject.model):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    told = [rows.fingerprint() for rows in (subject.test, subject.fit) if rows is not None]
    digest.update(repr(told).encode())
    return digest.hexdigest()[:16]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _versions() -> dict[str, str]:
    found = versions()
    for name in ("onnx", "onnxruntime"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _missing(known: Bench, pair: Pair, plan: Plan, own: str) -> set[tuple[str, int]]:
    """(policy, batch size) of the cells that are not known."""
    done = {(cell.policy, cell.batch_size) for cell in known.cells if cell.name == pair.named(own)}
    return {(name, size) for name in plan.policies for size in plan.batch_sizes} - done


def _estimate(subject: Subject, plan: Plan, missing: Mapping[Pair, set[tuple[str, int]]]) -> float:
    """About how many seconds the cells take: from the plain model's time at each batch size, once."""
    with threads(plan.threads):
        plain = {size: _plain_s(subject, size) for size in plan.batch_sizes}
    largest = max(plan.batch_sizes)
    judged = len(subject.test) / largest * plain[largest]
    fitted = 0.0 if subject.fit is None else len(subject.fit) / largest * plain[largest]
    total = 0.0
    for cells in filter(None, missing.values()):
        total += LOADING_S + EXPORTING_S + 1.5 * fitted + (3.5 + len(plan.policies)) * judged
        for size in {size for _, size in cells}:
            # stages, heads, steps and the whole model, in at least three rounds and a first one
            sizes = sizes_to(size)
            total += sum(max(plan.for_stages_s, 4 * 3 * plain[size] * each / size) for each in sizes)
        for _, size in cells:
            rounds = plan.timed_rows(size) / size * plain[size] * 4.5
            total += max(plan.seconds, 3 * rounds) + 1.2 * rounds
            total += 2 * plan.calls * plain[size] if size == 1 else 0.0
    return total


def _plain_s(subject: Subject, size: int) -> float:
    """Seconds of one call of the plain model."""
    device = next(subject.model.parameters()).device
    batch = to_device(subject.test.batch(torch.arange(size)).inputs, device)
    with torch.inference_mode():
        return alternate({"plain": lambda: subject.model.plain(batch)}, rounds=2, after=waiter(batch))["plain"].median_s
