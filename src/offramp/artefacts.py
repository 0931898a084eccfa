"""Writing files so that a stop in the middle leaves the old file whole."""

import contextlib
import glob
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from offramp.errors import FormatError

__all__ = ["clear_partial", "filled", "kind_of", "read_json", "removed_if_left", "write_atomically", "write_json"]


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """The path, after `write` filled a temporary file that then took its place in one rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with filled(path, write) as partial:
        os.replace(partial, path)
    return path


@contextlib.contextmanager
def filled(path: Path, write: Callable[[Path], Any]) -> Iterator[Path]:
    """A block that has a file which `write` filled and which is on the disk, to be renamed. It lies beside `path`, in a
    hidden folder of its own that is gone afterwards: some writers, such as safetensors, put a temporary file of theirs
    next to it. Others may read it as any new file; safetensors makes its own private."""
    room = path.with_name(f".{path.name}.{threading.get_ident()}.{os.getpid()}.partial")
    partial = room / path.name
    try:
        room.mkdir(exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        yield partial
    finally:
        shutil.rmtree(room, ignore_errors=True)


def clear_partial(path: Path, *, alone: bool = False) -> None:
    """Nothing; what killed processes were filling to take the place of `path` is gone. A running one keeps its own,
    unless nobody else writes there (`alone`): a restarted container gives its processes the same numbers again."""
    if path.parent.is_dir():
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            if alone:
                _remove(left)
            else:
                removed_if_left(left)


def removed_if_left(path: Path) -> bool:
    """Whether a file or folder was what a killed process was filling; then it is gone."""
    pid = path.name.removesuffix(".partial").rpartition(".")[2]
    left = path.name.startswith(".") and path.name.endswith(".partial") and pid.isdecimal() and not _alive(int(pid))
    if left:
        _remove(path)
    return left


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def write_json(path: str | Path, value: Mapping[str, Any]) -> Path:
    """The path, after `value` was written to it as JSON (no NaN, no infinities), atomically."""
    data = (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()

    def write(partial: Path) -> None:
        partial.write_bytes(data)

    return write_atomically(path, write)


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FormatError: the file is missing, is not UTF-8 JSON, or holds something other than an object.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist. Check the path.") from None
    except (OSError, ValueError, RecursionError) as error:  # also numbers and nesting too large to read
        raise FormatError(f"{path} is not readable as JSON: {error}. Write it again.") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a JSON {type(value).__name__}; expected an object. Write it again.")
    return value


def kind_of(value: Mapping[str, Any]) -> str:
    """What a JSON object says it is; "" when it does not say."""
    kind = value.get("kind")
    return kind if isinstance(kind, str) else ""


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no JSON")
