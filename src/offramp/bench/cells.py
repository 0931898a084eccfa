"""The cells of one engine: every policy at every batch size, in turns with what it is compared with."""

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from offramp.bench.engines import Made, judged_at, make, rate_of
from offramp.bench.plan import Pair, Plan, Subject
from offramp.bench.value import Cell, EngineFacts, Rate, Shorter, Tail, Took
from offramp.cost import CostModel
from offramp.errors import OfframpError
from offramp.inputs import Inputs, tensors_of
from offramp.machine import Timing, alternate, threads, waiter
from offramp.measure import measure
from offramp.metrics import bootstrap_difference
from offramp.policies import Fixed, Policy
from offramp.record import to_device
from offramp.runtime import Runtime
from offramp.timing import batches_of, never, over
from offramp.units import precision_of

__all__ = ["bench_engine", "sizes_to"]

ROUNDS, STAGE_ROUNDS = 200, 15  # at most
Right = Bool[Tensor, "row"]


def bench_engine(
    subject: Subject,
    plan: Plan,
    pair: Pair,
    done: Collection[tuple[str, int]],
    tell: Callable[[EngineFacts | Cell], None],
) -> None:
    """Nothing; the engine's facts and then every cell that is not done were told, one by one.

    An engine that cannot run tells facts that say why.

    Args:
        done: (policy, batch size) of cells that are known.
    """
    facts = EngineFacts(pair.engine, pair.precision or precision_of(subject.model))
    try:
        with threads(plan.threads):
            made = make(subject, plan, pair)
            facts = made.facts
            tell(facts)
            contest = _Contest(subject, plan, made)
            for size in plan.batch_sizes:
                for name in plan.policies:
                    if (name, size) not in done:
                        tell(contest.cell(name, size))
    except OfframpError as error:
        tell(_stopped(facts, str(error)))
    except Exception as error:  # of torch, a compiler or onnxruntime: the other engines go on
        tell(_stopped(facts, f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0][:200]}"))


def _stopped(facts: EngineFacts, why: str) -> EngineFacts:
    return replace(facts, why=why)


def sizes_to(size: int) -> tuple[int, ...]:
    """The sizes that stages are timed at for batches of `size` rows: powers of two, and the size."""
    return tuple(sorted({2**i for i in range(size.bit_length()) if 2**i <= size} | {size}))


class _Contest:
    """Cells of one engine; what several of them need is found once."""

    def __init__(self, subject: Subject, plan: Plan, made: Made) -> None:
        self.subject, self.plan, self.made, self.model = subject, plan, made, subject.model
        self.labels: Tensor = subject.test.labels  # type: ignore[assignment]
        self._costs: dict[int, CostModel] = {}
        self._known: dict[tuple[str, int], Right] = {}
        self._plain: Right | None = None
        self._device = next(self.model.parameters()).device

    def cell(self, name: str, size: int) -> Cell:
        """One policy at one batch size."""
        policy, batches, engine = self.made.policies[name], self._batches(size), self.made.engine
        costs = self._measured(size, batches)
        live = self._runtime(policy, costs)
        right = self._right(name, lambda batch: live(batch).label, size)
        shorter = self._shorter(float(right.double().mean()))
        left = [live(batch).exit for batch in batches]
        took = self._timed(live, policy, shorter, batches, left)
        total = torch.bincount(torch.cat(left).cpu(), minlength=self.model.exits).double()
        whole = self._right("", lambda batch: engine.whole(batch).argmax(dim=-1), size)
        plain = self._plain_right()
        rows, pick = len(batches) * size, self._faster_whole(took)
        return Cell(
            engine=engine.name,
            precision=engine.precision,
            policy=name,
            batch_size=size,
            batches=len(batches),
            rows=rows,
            rounds=took["live"].rounds,
            live=_took(took["live"], len(batches), rows),
            whole=_took(took[pick], len(batches), rows),
            eager=_took(took["eager"], len(batches), rows),
            unused=_took(took["unused"], len(batches), rows) if "unused" in took else None,
            speedup=took[pick].median_s / took["live"].median_s,
            eager_speedup=took["eager"].median_s / took["live"].median_s,
            whole_eager_speedup=took["eager"].median_s / took[pick].median_s,
            promise=took[pick].median_s / took["stages"].median_s,
            shares=tuple((total / total.sum()).tolist()),
            judged=len(right),
            accuracy=rate_of(right),
            whole_accuracy=rate_of(whole),
            plain_accuracy=rate_of(plain),
            lost=Rate(*bootstrap_difference(right, plain)),
            shorter=self._with_time(shorter, took, len(batches), rows),
            tail=self._tail(live) if size == 1 else None,
        )

    def _timed(
        self, live: Runtime, policy: Policy, shorter: Shorter, batches: list[Inputs], exits: list[Tensor]
    ) -> dict[str, Timing]:
        """Times of all contenders for the same batches, in alternating rounds; "stages" is what exits save at best."""
        calls: dict[str, Callable[[Inputs], object]] = {
            "live": live, "whole": self.made.engine.whole, "eager": self.model.plain,
        }  # fmt: skip
        if (unused := self._unused(policy, batches[0])) is not None:
            calls["unused"] = unused
        if shorter.exit is not None:
            calls["shorter"] = self._runtime(Fixed(shorter.exit, self.model.exits), None)
        contenders = {name: over(call, batches) for name, call in calls.items()}
        alone = [self.made.engine.stages_alone(*each) for each in zip(batches, exits, strict=True)]
        contenders["stages"] = lambda: [run() for run in alone]
        with torch.inference_mode():
            return alternate(contenders, rounds=ROUNDS, seconds=self.plan.seconds, after=waiter(batches[0]))

    def _runtime(self, policy: Policy, costs: CostModel | None) -> Runtime:
        engine = self.made.engine
        # the table says what thresholds were made on; a warning for each cell would say no more
        return Runtime(self.model, policy, engine, costs=costs, calibrated=engine.precision)

    def _unused(self, policy: Policy, batch: Inputs) -> Runtime | None:
        """The policy with no exit taken, or None for a family that has no thresholds for that."""
        try:
            run = self._runtime(never(policy), None)
        except (AttributeError, TypeError, OfframpError):
            return None
        return run if bool((run(batch).exit == self.model.exits - 1).all()) else None

    def _faster_whole(self, took: dict[str, Timing]) -> str:
        """Exits must not win by what the export alone saves: eager's whole model is the faster of two."""
        engine = self.made.engine
        if engine.name != "eager" or engine.precision != precision_of(self.model):
            return "whole"
        return min(("whole", "eager"), key=lambda name: took[name].median_s)

    def _batches(self, size: int) -> list[Inputs]:
        found = batches_of(self.subject.test, size, rows=self.plan.timed_rows(size))
        return [to_device(batch, self._device) for batch in found]

    def _measured(self, size: int, batches: Sequence[Inputs]) -> CostModel:
        """The costs on this engine of the batch of middling length, by which the runtime regroups."""
        if size not in self._costs:
            middle = sorted(batches, key=lambda batch: tensors_of(batch)[0].numel())[len(batches) // 2]
            self._costs[size] = measure(
                self.model, middle, batch_sizes=sizes_to(size), rounds=STAGE_ROUNDS, seconds=self.plan.for_stages_s,
                engine=self.made.engine, policy=next(iter(self.made.policies.values())),
            )  # fmt: skip
        return self._costs[size]

    def _right(self, name: str, call: Callable[[Inputs], Tensor], size: int) -> Right:
        """Which of all judged rows a call has right; "" is the whole model. Answers do not depend on the batch size, so
        one is enough, but for "int8-batch", where they do."""
        size = size if self.made.engine.precision == "int8-batch" else max(self.plan.batch_sizes)
        if (name, size) not in self._known:
            self._known[name, size] = torch.cat(judged_at(self.subject, call, size)).cpu() == self.labels
        return self._known[name, size]

    def _plain_right(self) -> Right:
        if self._plain is None:
            said = judged_at(self.subject, lambda batch: self.model.plain(batch).argmax(-1), max(self.plan.batch_sizes))
            self._plain = torch.cat(said).cpu() == self.labels
        return self._plain

    def _shorter(self, accuracy: float) -> Shorter:
        """The first exit that alone is at least so right; its time is not known yet."""
        exits = self.made.test.accuracy()
        for k, alone in enumerate(exits[:-1]):
            if alone >= accuracy - 1e-12:
                return Shorter(k, accuracy=rate_of(self.made.test.logits[k].argmax(dim=-1) == self.labels))
        if exits[-1] >= accuracy - 1e-12:
            return Shorter(note="no early exit alone is as right; the whole model is")
        return Shorter(note="neither an exit alone nor the whole model is as right")

    def _with_time(self, shorter: Shorter, took: dict[str, Timing], batches: int, rows: int) -> Shorter:
        return replace(shorter, took=_took(took["shorter"], batches, rows)) if "shorter" in took else shorter

    def _tail(self, live: Runtime) -> Tail:
        """Single calls on single rows, the policy and the whole model in turns."""
        rows = len(self.subject.test)
        calls: dict[str, Callable[[Inputs], object]] = {"live": live, "whole": self.made.engine.whole}
        taken: dict[str, list[float]] = {name: [] for name in calls}
        wait = waiter(self._batches(1)[0])
        with torch.inference_mode():
            for i in range(max(2, self.plan.calls)):
                one = to_device(self.subject.test.batch(torch.tensor([i % rows])).inputs, self._device)
                for name in calls if i % 2 == 0 else reversed(calls):
                    start = time.perf_counter()
                    calls[name](one)
                    wait()
                    taken[name].append(time.perf_counter() - start)
        count = len(taken["live"])
        return Tail(count, min(rows, count), _percentiles(taken["live"]), _percentiles(taken["whole"]))


def _took(timing: Timing, batches: int, rows: int) -> Took:
    return Took(1000 * timing.median_s / batches, 1000 * timing.spread_s / batches, rows / timing.median_s)


def _percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Milliseconds at 50, 95 and 99 %."""
    cuts: Any = statistics.quantiles(seconds, n=100, method="inclusive")
    return 1000 * cuts[49], 1000 * cuts[94], 1000 * cuts[98]
