"""What every preprocessing is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from offramp.artefacts import write_json
from offramp.errors import ValueRangeError
from offramp.inputs import Inputs

__all__ = ["FILE", "KIND", "VERSION", "Preprocess", "Row", "check_names", "write_fields"]

KIND, VERSION, FILE = "offramp.preprocess", 1, "preprocess.json"

Row = Mapping[str, Any]


@runtime_checkable
class Preprocess(Protocol):
    """From raw rows to inputs. The same value feeds training, recording, a run and a bundle.

    Attributes:
        kind: "text", "image" or "numbers".
        columns: which columns of a row it reads.
    """

    kind: ClassVar[str]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads."""
        ...

    def batch(self, rows: Sequence[Row]) -> Inputs:
        """The inputs of some rows, one batch that the model takes."""
        ...

    def check(self, row: Row) -> str | None:
        """Why a row cannot be used, or None when it can."""
        ...

    def save(self, folder: Path) -> None:
        """Nothing; preprocess.json and what belongs to it are in the folder."""
        ...


def write_fields(folder: Path, kind: str, fields: Mapping[str, Any]) -> None:
    """Nothing; the fields of a preprocessing of that kind are in preprocess.json."""
    write_json(folder / FILE, {"kind": KIND, "version": VERSION, "of": kind, "fields": dict(fields)})


def check_names(names: Sequence[str], what: str, most: int = 10_000) -> tuple[str, ...]:
    """The names as a tuple, when there is at least one and none twice.

    Raises:
        ValueRangeError: otherwise.
    """
    found = tuple(names)
    good = 0 < len(found) <= most and all(isinstance(name, str) and name for name in found)
    if not good or len(set(found)) != len(found):
        raise ValueRangeError(f"{what} is {str(names)[:80]}; expected 1 to {most} different names.")
    return found
