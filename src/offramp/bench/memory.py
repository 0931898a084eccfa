"""How much memory this process holds, as Linux counts it."""

import gc
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Growth", "resident_mb"]

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_mb() -> tuple[float, float] | None:
    """(resident now, resident at the most) in MB; None where that is not told, as on other systems than Linux."""
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = {key: value for key, _, value in (line.partition(":") for line in lines)}
    if not {"VmRSS", "VmHWM"} <= set(found):
        return None
    now, most = (int(found[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
    return now, most


@dataclass(frozen=True)
class Growth:
    """What a process took since `begin`: MB at the most, and MB that stayed."""

    peak_mb: float
    kept_mb: float

    @staticmethod
    def begin() -> float | None:
        """Resident MB now, after the kernel was asked to forget the peak; None where it does not tell."""
        gc.collect()
        try:
            FORGET.write_text("5", encoding="ascii")  # resets VmHWM
        except OSError:
            return None
        found = resident_mb()
        return None if found is None else found[0]

    @classmethod
    def since(cls, before: float | None) -> "Growth | None":
        """The growth since `begin` gave `before`."""
        gc.collect()
        found = resident_mb()
        if before is None or found is None:
            return None
        return cls(max(0.0, found[1] - before), max(0.0, found[0] - before))
