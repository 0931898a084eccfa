"""CSV, TSV, JSON lines, JSON arrays and parquet, row by row."""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offramp.errors import DataError, MissingExtra, first_line
from offramp.sources.base import Numbered, Source

__all__ = ["SUFFIXES", "Delimited", "Folded", "JsonLines", "Parquet", "table"]

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
LONGEST_FIELD = 2**26  # characters; a longer one is a quotation mark that was never closed
LONGEST_LINE = 2**26
LARGEST_ARRAY = 2**30  # bytes of a JSON array, which is read whole
HEAD = 100


def table(path: Path, encoding: str = "utf-8") -> Source:
    """The source of one file, by its ending; `.gz` may follow.

    Raises:
        DataError: the ending is of no kind that is read, or the file is empty or damaged.
    """
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return Parquet(path)
    if name.endswith((".csv", ".tsv")):
        return Delimited(path, encoding, "\t" if name.endswith(".tsv") else None)
    if name.endswith((".jsonl", ".ndjson", ".json")):
        return JsonLines(path, encoding)
    raise DataError(f"{path} ends in {path.suffix or 'nothing'!r}; expected {', '.join(SUFFIXES)}, or a folder.")


class _TextFile(Source):
    unit = "line"

    def __init__(self, path: Path, encoding: str) -> None:
        super().__init__()
        self.path, self.name = path, str(path)
        self.encoding = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding

    def _binary(self) -> Any:
        try:
            return gzip.open(self.path, "rb") if self.path.suffix == ".gz" else open(self.path, "rb")
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}.") from None

    def _refused(self, error: UnicodeDecodeError) -> DataError:
        """The error of text in another encoding, with the line that it is on."""
        with self._binary() as file:
            number, reason = 1, error
            for place, line in enumerate(file, 1):
                try:
                    line.decode(self.encoding)
                except UnicodeDecodeError as found:
                    number, reason = place, found
                    break
        byte = f"byte 0x{reason.object[reason.start]:02x}" if reason.object else "a byte"
        return DataError(
            f"line {number} of {self.name} is not {self.encoding.removesuffix('-sig')} ({byte}: {reason.reason}). "
            "Give its encoding (--encoding latin-1, cp1252, utf-16, ...), or convert it."
        )


class Delimited(_TextFile):
    """A CSV or TSV file with a header line.

    Args:
        delimiter: None finds it in the header line, of comma, semicolon, tab and bar.

    Raises:
        DataError: there is no header, or it names a column twice.
    """

    def __init__(self, path: Path, encoding: str = "utf-8", delimiter: str | None = None) -> None:
        super().__init__(path, encoding)
        self._delimiter = delimiter
        first = next(self._lines(), None)
        if first is None:
            raise DataError(f"{self.name} is empty; expected a header line and rows.")
        header = [name.strip() for name in first[1]]
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice or not all(header):
            what = f"names {twice[0]!r} twice" if twice else f"has a column without a name: {header}"
            raise DataError(f"the header of {self.name} {what}; expected a different name for each column.")
        self.columns = tuple(header)

    def rows(self, split: str | None = None) -> Iterator[Numbered]:
        """(line, row); the header is line 1. Blank lines are passed over and counted.

        Raises:
            DataError: a line has more or fewer fields than the header, or cannot be read.
        """
        self.skipped = 0
        lines = self._lines()
        next(lines, None)
        width = len(self.columns)
        for number, fields in lines:
            if not fields or (fields == [""] and width > 1):
                self.skipped += 1
                continue
            if len(fields) != width:
                raise DataError(
                    f"line {number} of {self.name} has {len(fields)} fields; the header has {width}. Mend the line; "
                    "a field with a delimiter or a line break in it stands in quotation marks."
                )
            yield number, dict(zip(self.columns, fields, strict=True))

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))
        reader = None
        try:
            with self._binary() as binary, io.TextIOWrapper(binary, encoding=self.encoding, newline="") as file:
                if self._delimiter is None:
                    self._delimiter = _delimiter(file.readline(LONGEST_LINE))
                    file.seek(0)
                reader = csv.reader(file, delimiter=self._delimiter, strict=True)
                for fields in reader:
                    yield reader.line_num, fields
        except UnicodeDecodeError as error:
            raise self._refused(error) from None
        except csv.Error as error:
            number = reader.line_num if reader is not None else 1
            raise DataError(
                f"line {number} of {self.name} cannot be read: {error}. Look for an unclosed quotation mark."
            ) from None
        except (EOFError, OSError, LookupError) as error:
            raise DataError(f"{self.name} cannot be read: {error}.") from None


class JsonLines(_TextFile):
    """JSON objects, one a line, or an array of them.

    Raises:
        DataError: the file is empty, or its first line holds something else.
    """

    def __init__(self, path: Path, encoding: str = "utf-8") -> None:
        super().__init__(path, encoding)
        self._array = False
        with self._binary() as file:
            try:
                start = file.read(4096).decode(self.encoding, errors="ignore").lstrip()
            except (EOFError, OSError, LookupError) as error:
                raise DataError(f"{self.name} cannot be read: {error}.") from None
        if not start:
            raise DataError(f"{self.name} is empty; expected JSON objects, one a line.")
        self._array = start.startswith("[")
        self.unit = "object" if self._array else "line"
        self.columns = tuple(dict.fromkeys(name for row in self.head(HEAD) for name in row))

    def rows(self, split: str | None = None) -> Iterator[Numbered]:
        """(line, row). Blank lines are passed over and counted.

        Raises:
            DataError: a line is no JSON object.
        """
        self.skipped = 0
        for number, text in self._texts():
            if isinstance(text, str) and not text.strip():
                self.skipped += 1
                continue
            try:
                row = json.loads(text) if isinstance(text, str) else text
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.where(number)} is not JSON: {error}. Expected one object a line.") from None
            if not isinstance(row, dict):
                raise DataError(f"{self.where(number)} is a JSON {type(row).__name__}; expected an object.")
            yield number, row

    def _texts(self) -> Iterator[tuple[int, Any]]:
        try:
            with self._binary() as binary, io.TextIOWrapper(binary, encoding=self.encoding, newline="\n") as file:
                if self._array:
                    yield from enumerate(self._whole(file), 1)
                    return
                number = 0
                while line := file.readline(LONGEST_LINE + 1):
                    number += 1
                    if len(line) > LONGEST_LINE:
                        raise DataError(f"line {number} of {self.name} is too long to be one row.")
                    yield number, line
        except UnicodeDecodeError as error:
            raise self._refused(error) from None
        except (EOFError, OSError, LookupError) as error:
            raise DataError(f"{self.name} cannot be read: {error}.") from None

    def _whole(self, file: Any) -> list[Any]:
        if self.path.stat().st_size > LARGEST_ARRAY:
            raise DataError(f"{self.name} is one JSON array of over 1 GiB; write one object a line, which is streamed.")
        try:
            return json.load(file)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.name} is not JSON: {error}.") from None


class Parquet(Source):
    """A parquet file; class names are read from the metadata that the hub's data sets have.

    Raises:
        DataError: it is no parquet file.
        MissingExtra: pyarrow is not installed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.name = path, str(path)
        with self._file() as file:
            schema = file.schema_arrow
        self.columns = tuple(schema.names)
        twice = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if twice:
            raise DataError(f"{self.name} has two columns {twice[0]!r}; expected different names.")
        self.classes = _class_names(schema.metadata or {})

    def rows(self, split: str | None = None) -> Iterator[Numbered]:
        """(row from 1, row).

        Raises:
            DataError: the file is damaged.
        """
        import pyarrow

        number = 0
        try:
            with self._file() as file:
                for batch in file.iter_batches(batch_size=256):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.name} is damaged after row {number}: {_line(error)}.") from None

    def _file(self) -> Any:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise MissingExtra("parquet files need pyarrow: pip install 'offramp[train]'.") from None
        try:
            return parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.name} is no parquet file that can be read: {_line(error)}.") from None


class Folded(Source):
    """Several files of one folder as splits.

    Args:
        files: split -> source.
    """

    def __init__(self, name: str, files: dict[str, Source]) -> None:
        super().__init__()
        self.name, self._files = name, files
        self.splits = tuple(files)
        first = next(iter(files.values()))
        self.columns, self.unit, self.classes = first.columns, first.unit, first.classes

    def rows(self, split: str | None = None) -> Iterator[Numbered]:
        """(number, row) of a split, the first one unless named."""
        return self._files[self.check_split(split) or self.splits[0]].rows()


def _delimiter(header: str) -> str:
    """The likeliest delimiter of a header line; a comma when there is one column."""
    return max((",", ";", "\t", "|"), key=header.count)


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {
            name: tuple(map(str, feature["names"]))
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _line(error: BaseException) -> str:
    return first_line(error).rstrip(".")
