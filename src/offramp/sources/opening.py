"""`open_source`: rows from whatever a user has."""

from pathlib import Path

from offramp.errors import DataError
from offramp.sources.base import Source
from offramp.sources.folders import Hub, folder
from offramp.sources.tables import SUFFIXES, table

__all__ = ["open_source"]


def open_source(name: str | Path, *, encoding: str = "utf-8") -> Source:
    """The source of a path or of a hub name.

    Args:
        name: a .csv, .tsv, .jsonl, .json or .parquet file (text ones may end in .gz); a folder of images or of such
            files; or, when no such path exists, the name of a hub data set, "owner/name" or "name:configuration".
        encoding: of text files.

    Raises:
        DataError: nothing can be read there.
        MissingExtra: what reads it is not installed.
    """
    path = Path(name)
    if path.is_dir():
        return folder(path, encoding)
    if path.exists():
        if not path.is_file():
            raise DataError(f"{path} is no file or folder. Give one, or - for standard input where that is taken.")
        return table(path, encoding)
    text = str(name)
    looks_like_path = path.is_absolute() or text.startswith(".") or text.count("/") > 1
    if looks_like_path or text.lower().removesuffix(".gz").endswith(SUFFIXES):
        raise DataError(f"{path} does not exist. Check the path.")
    return Hub(text)
