"""The main job, end to end: train a network with exits, calibrate policies to half the cost, and time them live."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offramp.artefacts import write_json
from offramp.compare import HEADLINE, Compared, Pool, compare, compare_pooled, halves
from offramp.cost import Budget, CostModel
from offramp.data import Examples
from offramp.engines import Engine
from offramp.errors import DataError
from offramp.jobs import Job, job
from offramp.machine import machine_line, threads
from offramp.measure import measure
from offramp.meter import Meter
from offramp.metrics import near_decision
from offramp.model import ExitModel, MultiExitModel
from offramp.policies import to_dict
from offramp.record import record
from offramp.runs import save_run
from offramp.runtime import Runtime
from offramp.simulate import simulate
from offramp.timing import Speed, batches_of, never, time_policies
from offramp.trace import ExitTrace
from offramp.train import train

__all__ = ["QuickResult", "parity", "quickstart", "time_table"]

FRACTION = 0.5
SMALL = ("max-prob", "beem-a", "eenet")


@dataclass(frozen=True)
class QuickResult:
    """Everything that the quickstart measured.

    Args:
        task: its name.
        splits: the names of the rows that policies were calibrated and tested on; one name means halves of it.
        train_s: seconds of training.
        exits: accuracy of every exit on the test rows; the last is the model without exits.
        rows: (train, calibrate, test) counts.
        table: policies on test rows.
        speeds: policies live, by batch size.
        unused: the same with every exit visited and none taken.
        parity: per policy (rows compared, those near a decision, others whose exit differed, near ones whose exit did).
        note: what a reader must know, or "".
        machine: where it was measured.
    """

    task: str
    splits: tuple[str, str]
    train_s: float
    exits: tuple[float, ...]
    rows: tuple[int, int, int]
    table: tuple[Compared, ...]
    speeds: tuple[Speed, ...]
    unused: tuple[Speed, ...]
    parity: dict[str, tuple[int, int, int, int]]
    note: str
    machine: str

    def to_dict(self) -> dict[str, Any]:
        """The result as a JSON object."""
        value = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        value["table"] = [{**vars(row), "policy": to_dict(row.policy)} for row in self.table]
        value["speeds"] = [{**dataclasses.asdict(s), "kept": s.kept} for s in self.speeds]
        value["unused"] = [dataclasses.asdict(s) for s in self.unused]
        return value


def quickstart(
    task: str = "digits",
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    epochs: int | None = None,
    limit: int | None = None,
    families: Sequence[str] | None = None,
    batch_sizes: Sequence[int] | None = None,
    repeats: int = 20,
    seconds: float = 20.0,
    timed_threads: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> QuickResult:
    """What exits are worth on a task, measured on this machine; run, trace, costs and policies are left in `out`.

    Args:
        task: "digits" (a minute), "sst2" (about 12 minutes an epoch on two cores), or another job.
        data: for tasks other than digits, the folder of data sets; None asks the hub.
        out: where things are written; by default runs/<task>.
        epochs, limit: fewer or more epochs, and at most so many training rows.
        families: names in `offramp.compare.CHOICES`.
        batch_sizes: to time live runs at.
        repeats: of swapped halves, where calibration and test rows come from one split.
        seconds: of timing live runs per batch size; stages and heads get a tenth.
        timed_threads: torch threads while timing; by default 1 for the digits, because on a network this small waking a
            second thread costs more than it gives, and otherwise what torch has.
        seed: of everything.
        progress: bars and lines on standard error.

    Raises:
        DataError, MissingExtra: the data or a package is missing.
    """
    small = task == "digits"
    names = tuple(families or (SMALL if small else HEADLINE))
    sizes = tuple(batch_sizes or ((1, 64) if small else (1, 8, 32, 128)))
    folder = Path(out) if out is not None else Path("runs") / task
    work = job(task, data=data, epochs=epochs, limit=limit, seed=seed)
    model, tokenizer = work.build()
    options = {"epochs": epochs, "limit": limit, "seed": seed, "head": work.head}
    rows, train_s = _train(work, model, tokenizer, folder, options, progress)
    pools, trace, test = _record(work, model, tokenizer, folder, repeats, seed, progress)
    with threads(timed_threads or (1 if small else None)):
        figures = _figures(model, pools, trace, test, names, sizes, seconds, folder / "costs.json", progress)
        machine = machine_line()
    result = QuickResult(
        task=task,
        splits=work.splits[1:],
        train_s=train_s,
        exits=trace.accuracy(),
        rows=(rows, pools[0].fit.rows, pools[0].test.rows),
        note=work.note,
        machine=machine,
        **figures,
    )
    write_json(folder / "result.json", result.to_dict())
    return result


def _figures(
    model: MultiExitModel, pools: tuple[Pool, ...], trace: ExitTrace, test: Examples, families: Sequence[str],
    sizes: Sequence[int], seconds: float, costs_path: Path, progress: bool,
) -> dict[str, Any]:  # fmt: skip
    """The table of policies, their live speeds and the parity of live and simulated exits, by field of QuickResult."""
    say = Meter("quickstart", None, progress).line
    steps = tuple(sorted({2**i for i in range(12) if 2**i <= max(sizes)} | set(sizes)))
    say(f"measuring stages at {len(steps)} batch sizes, about {len(steps) * seconds / 10:.0f} s")
    typical = test.batch(torch.arange(min(len(test), 64))).inputs
    costs = measure(model, typical, batch_sizes=steps, seconds=seconds / 10)
    costs.save(costs_path)
    say(f"calibrating {len(families)} policies on {len(pools)} split(s) of {trace.rows} rows")
    table = _table(pools, trace, costs, families)
    policies = {row.family: row.policy for row in table}
    say(f"timing live runs at {len(sizes)} batch sizes, {seconds:.0f} s each, or three rounds where they take longer")
    speeds, unused = time_table(model, policies, test, costs, sizes, seconds=seconds)
    say("comparing live exits with simulated ones")
    same = parity(model, policies, test, costs, tuple(sorted({1, 7, min(max(sizes), len(test))})))
    return {"table": table, "speeds": speeds, "unused": unused, "parity": same}


def _train(
    work: Job, model: MultiExitModel, tokenizer: Any, folder: Path, options: dict[str, Any], progress: bool
) -> tuple[int, float]:
    """(training rows, seconds of training), with the run saved. A stopped training goes on where it was."""
    rows = work.load(work.splits[0], tokenizer)
    report = train(
        model, rows, objective=work.objective, recipe=work.recipe, checkpoint=folder / "checkpoint", progress=progress
    )
    model.eval()
    save_run(folder, work.name, options, model, report, objective=work.objective, recipe=work.recipe)
    return len(rows), report.seconds


def _record(
    work: Job, model: MultiExitModel, tokenizer: Any, folder: Path, repeats: int, seed: int, progress: bool
) -> tuple[tuple[Pool, ...], ExitTrace, Examples]:
    """(pools, the trace of all held-out rows, the test rows), with the traces saved."""
    _, first, second = work.splits
    test = work.load(second, tokenizer)
    test_trace = record(model, test, progress=progress)
    test_trace.save(folder / f"{second}.safetensors")
    if first == second:
        if test_trace.rows < 4:
            raise DataError(f"{work.name} has {test_trace.rows} held-out rows; expected at least 4 to halve.")
        return halves(test_trace, repeats, seed=seed), test_trace, test
    fit = record(model, work.load(first, tokenizer), progress=progress)
    fit.save(folder / f"{first}.safetensors")
    return (Pool(fit, test_trace, torch.arange(test_trace.rows)),), test_trace, test


def _table(
    pools: tuple[Pool, ...], trace: ExitTrace, costs: CostModel, families: Sequence[str]
) -> tuple[Compared, ...]:
    target = Budget(fraction=FRACTION)
    if len(pools) == 1:
        return compare(pools[0].fit, pools[0].test, costs, [target], families)
    return compare_pooled(pools, trace.rows, costs, target, families)


def time_table(
    model: MultiExitModel, policies: dict[str, Any], test: Examples, costs: CostModel, sizes: Sequence[int], *,
    rows: int = 256, seconds: float = 20.0,
) -> tuple[tuple[Speed, ...], tuple[Speed, ...]]:  # fmt: skip
    """(speeds of the policies, speeds with every exit visited and none taken) at each size that the rows fill."""
    speeds: list[Speed] = []
    unused: list[Speed] = []
    _name, policy = next(iter(policies.items()))
    for size in sizes:
        if len(test) < size:
            continue
        everything = {**policies, "none taken": never(policy)}
        took = time_policies(
            model, everything, batches_of(test, size, rows=max(rows, 2 * size)), costs=costs, seconds=seconds
        )
        speeds += [s for s in took if s.policy != "none taken"]
        unused += [s for s in took if s.policy == "none taken"]
    return tuple(speeds), tuple(unused)


def parity(
    model: ExitModel, policies: dict[str, Any], test: Examples, costs: CostModel, sizes: Sequence[int], *,
    engine: Engine | None = None, tolerance: float = 1e-5,
) -> dict[str, tuple[int, int, int, int]]:  # fmt: skip
    """Per policy: (rows compared, how many of them are near a decision, how many others leave live at another exit than
    simulated, how many of those near do).

    Args:
        engine: what runs live, and what the simulated logits are recorded with; eager unless given.
        tolerance: how near a score, or two logits, must be for rounding to decide.
    """
    trace = record(model, test, progress=False, engine=engine)
    counts = {}
    for name, policy in policies.items():
        outcome = simulate(policy, trace, costs)
        run = Runtime(model, policy, engine or "eager", calibrated=None if engine is None else engine.precision)
        near = near_decision(policy, trace, outcome, tolerance)
        compared = beside = differs = moved = 0
        for size in sizes:
            parts = [torch.arange(i, min(i + size, len(test))) for i in range(0, len(test), size)]
            live = torch.cat([run(test.batch(part).inputs).exit for part in parts])
            other = live != outcome.exit
            compared += len(live)
            beside += int(near.sum())
            differs += int((other & ~near).sum())
            moved += int((other & near).sum())
        counts[name] = (compared, beside, differs, moved)
    return counts
