"""Several processes, on one machine or many, that train or record together, as `accelerate launch` starts them."""

import atexit
import contextlib
import importlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from offramp.data import Batch
from offramp.errors import ProcessLost, first_line

__all__ = ["Processes", "processes"]

ENDING = threading.Event()
LOST = (
    "another process of this run ended, or cannot be reached ({why}). What was saved is kept: start the same command "
    "again, and it goes on from there."
)


def processes() -> "Processes":
    """The processes of this run: those that a launcher started, or this one alone."""
    begun = _begun()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 and not begun:
        return Processes(0, 1)
    from accelerate import PartialState

    if not begun:
        # its functions keep, as a default, the group there is when they are defined, which could then never end
        importlib.import_module("torch.distributed.nn.functional")
    # accelerate takes a launched process without a GPU for one alone unless it is told
    state = PartialState(cpu=not torch.cuda.is_available())
    if not begun and _begun():
        atexit.register(_end)
    return Processes(state.process_index, state.num_processes)


def _begun() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _end() -> None:
    """Nothing; gloo's threads are gone before the interpreter is: one that still lets go of the last message's tensors
    then asks for the interpreter's lock, and aborts the process (pytorch issues 179291 and 190489). NCCL ends by
    itself, and ending it while another process fails can hang."""
    if _begun() and torch.distributed.get_backend() == "gloo" and not ENDING.is_set():
        torch.distributed.destroy_process_group()


class Processes:
    """This process among those of a run.

    Attributes:
        rank: this one's number, from 0; 0 writes files and tells what happens.
        count: how many there are.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and tells."""
        return self.rank == 0

    def part_of(self, rows: int) -> range:
        """This process's part of so many rows; parts differ by one row at the most, and some may be empty."""
        return range(self.rank * rows // self.count, (self.rank + 1) * rows // self.count)

    def share(self, batch: Batch) -> tuple[Batch, float]:
        """(this process's rows of a batch, their share of it). Where there are fewer rows than processes, some get one
        that counts nothing, since all have to take part in every step."""
        if self.count == 1:
            return batch, 1.0
        rows = len(batch.rows)
        mine = self.part_of(rows)
        part = slice(mine.start, mine.stop) if len(mine) else slice(0, 1)
        inputs: Any = batch.inputs
        inputs = {k: v[part] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[part]
        labels = None if batch.labels is None else batch.labels[part]
        return Batch(inputs, labels, batch.rows[part]), len(mine) / rows

    def add_up(self, tensors: list[Tensor]) -> None:
        """Nothing; each tensor is the sum of those of all processes.

        Raises:
            ProcessLost: another process is gone.
        """
        if self.count == 1 or not tensors:
            return
        by_kind: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_kind.setdefault(tensor.dtype, []).append(tensor.detach())
        for same in by_kind.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in same])  # one message instead of hundreds
            with _together():
                torch.distributed.all_reduce(flat)
            for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def agree(self, module: nn.Module) -> None:
        """Nothing; all parameters and buffers are those of the first process.

        Raises:
            ProcessLost: another process is gone.
        """
        if self.count == 1:
            return
        with _together(), torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                torch.distributed.broadcast(tensor.data, 0)

    def average_buffers(self, module: nn.Module) -> None:
        """Nothing; every buffer with fractions, such as BatchNorm's running values, is the mean over processes.

        Raises:
            ProcessLost: another process is gone.
        """
        held = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self.add_up(held)
        if self.count > 1:
            for buffer in held:
                buffer.div_(self.count)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, in each of them. For values of the CPU.

        Raises:
            ProcessLost: another process is gone.
        """
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with _together():
            torch.distributed.all_gather_object(found, value)
        return found

    @contextlib.contextmanager
    def told_when_stopped(self) -> Iterator[None]:
        """A block in which this process says why it ends, when a launcher ends it because another one is gone.

        Raises:
            ProcessLost: it was told to end.
        """
        alone = self.count == 1 or threading.current_thread() is not threading.main_thread()
        if alone:
            yield
            return

        def stop(*_: Any) -> None:
            if not ENDING.is_set():  # otherwise it is on its way out already
                ENDING.set()
                raise ProcessLost(LOST.format(why="the launcher ended this process"))

        ENDING.clear()  # an earlier run in this process may have ended so
        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """A block in which all processes take part."""
    try:
        yield
    except ProcessLost:  # said by the signal's handler
        raise
    except RuntimeError as error:  # gloo and nccl say it in many ways
        ENDING.set()
        why = re.sub(r"^\[[^\]]*\]\s*", "", first_line(error, 300)).partition(". ")[0]
        raise ProcessLost(LOST.format(why=why)) from None
