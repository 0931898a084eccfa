"""Files that can always be made again: exported graphs and compiled code, kept between runs.

They lie in `OFFRAMP_CACHE`, or `offramp` in the user's cache folder. Anything there may be deleted at any time.
"""

import contextlib
import functools
import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from offramp.artefacts import write_atomically

__all__ = ["cache_folder", "kept_file"]

#: The files that were not used for longest leave when all together are larger.
MOST_BYTES = 8 * 2**30
#: What we name files: nothing else in the folder is ever touched.
OURS = re.compile(r"[0-9a-f]{24}-")


def cache_folder() -> Path:
    """Where files are kept."""
    named = os.environ.get("OFFRAMP_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offramp"


def kept_file(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """The path of a file that `make` filled, now or in an earlier run.

    A file that is not what was written (cut off, changed) is made again, with a line on standard error.

    Args:
        name: what it ends in, such as "stage-0.onnx".
        key: says what is in it: the same key and the same Offramp, the same contents.
        make: fills the path that it is given.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = cache_folder() / f"{_named(key, name)}-{name}"
    digest = path.with_name(f"{path.name}.sha256")
    try:
        if digest.read_text(encoding="ascii") == _sha256(path):
            with contextlib.suppress(OSError):  # a cache of somebody else's is read all the same
                os.utime(path)
            return path
        print(f"offramp: {path} in the cache is damaged; it is made again.", file=sys.stderr)
    except OSError:
        pass  # it is not there yet
    except ValueError:
        print(f"offramp: {digest} in the cache is damaged; it is made again.", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(path, make)
    write_atomically(digest, lambda partial: _write(_sha256(path), partial))
    _shrink(path)
    return path


def _named(key: str, name: str) -> str:
    return hashlib.sha256(f"{_own_code()} {name} {key}".encode()).hexdigest()[:24]


@functools.cache
def _own_code() -> str:
    """What tells one version of Offramp from another: what another one wrote is not read."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="ascii")


def _shrink(newest: Path) -> None:
    """Nothing; the files of ours that were not used for longest are gone where all together were too large."""
    try:
        ours = [path for path in newest.parent.iterdir() if OURS.match(path.name) and path.is_file()]
        files = sorted((path for path in ours if path.suffix != ".sha256"), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total <= MOST_BYTES:
                return
            if path != newest:
                total -= path.stat().st_size
                path.unlink(missing_ok=True)
                path.with_name(f"{path.name}.sha256").unlink(missing_ok=True)
    except OSError:
        return  # another process cleans up as well
