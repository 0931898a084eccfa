"""Which machine a time was measured on, and how a time is measured."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from offramp.inputs import Inputs, tensors_of

__all__ = ["Timing", "alternate", "fast_precision", "machine_line", "processor", "threads", "versions", "waiter"]


@dataclass(frozen=True)
class Timing:
    """Median seconds of one contender and the interquartile range over rounds."""

    median_s: float
    spread_s: float
    rounds: int


def machine_line() -> str:
    """One line: processor, cores, threads, torch and Python versions, GPU if one is used."""
    gpu = ""
    if torch.cuda.is_initialized():  # asking for more would touch the GPU
        gpu = f"{torch.cuda.get_device_name()}, "
    return (
        f"{gpu}{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def processor() -> str:
    """The processor's name."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux: the platform's own name will do
    return name


def versions() -> dict[str, str]:
    """The versions of Python, Offramp and the packages that a model's answers depend on, as far as installed."""
    found = {"python": platform.python_version()}
    for name in ("offramp", "torch", "transformers", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def fast_precision() -> str:
    """What trains faster: "bf16" where GPU or processor multiply it natively, else "fp32", as emulation is slow."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if known.get("avx512_bf16") or known.get("amx_bf16") or known.get("bf16") else "fp32"


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch uses `count` threads for the length of the block; None leaves their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def waiter(inputs: Inputs) -> Callable[[], None]:
    """What waits until the device of the inputs has finished: nothing on a CPU."""
    device = tensors_of(inputs)[0].device
    if device.type == "cpu":
        return lambda: None
    return lambda: getattr(torch, device.type).synchronize(device)


def alternate(
    contenders: dict[str, Callable[[], object]],
    *,
    rounds: int = 15,
    min_rounds: int = 3,
    seconds: float = 2.0,
    after: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Median times of contenders that take turns, so that drift of the machine hits all alike.

    Args:
        contenders: what to call, by name. Each is called once unmeasured first.
        rounds: at most so many turns.
        min_rounds: at least so many, even when `seconds` have passed.
        seconds: stop after about so long.
        after: waits for the device, e.g. torch.cuda.synchronize.
    """
    wait = after or (lambda: None)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    wait()
    begin = time.perf_counter()
    names = list(contenders)
    for turn in range(rounds):
        if turn >= min_rounds and time.perf_counter() - begin > seconds:
            break
        for name in names if turn % 2 == 0 else reversed(names):
            start = time.perf_counter()
            contenders[name]()
            wait()
            taken[name].append(time.perf_counter() - start)
    return {name: _timing(values) for name, values in taken.items()}


def _timing(values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], 0.0, 1)
    low, middle, high = statistics.quantiles(values, n=4)
    return Timing(middle, high - low, len(values))
