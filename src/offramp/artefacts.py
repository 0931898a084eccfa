"""Writing files so that a stop in the middle leaves the old file whole."""

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from offramp.errors import FormatError

__all__ = ["fill", "kind_of", "read_json", "write_atomically", "write_json"]


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> Path:
    """The path, after `write` filled a temporary neighbour that then took its place in one rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{threading.get_ident()}.{os.getpid()}.partial")
    try:
        fill(partial, write)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def fill(path: Path, write: Callable[[Path], Any]) -> None:
    """Nothing; `write` filled the file, which others may read as any new file; safetensors makes it private."""
    path.touch()
    mode = path.stat().st_mode
    write(path)
    path.chmod(mode)


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
