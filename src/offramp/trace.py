"""What every exit said about every row: the one input of calibration and simulation."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.artefacts import write_atomically
from offramp.errors import DataError, FormatError, ShapeError, ValueRangeError
from offramp.shapes import check_finite, check_labels, check_shape
from offramp.splits import stratified_split

__all__ = ["ExitTrace"]

KIND, VERSION = "offramp.trace", 1


@dataclass(frozen=True, eq=False)
class ExitTrace:
    """Logits of every exit for every row, in the rows' order.

    Args:
        logits: float [exit row cls]; kept as float32 on the CPU. The last exit is the model's own output.
        labels: class indices [row], kept as int64, or None when they are not known.
        signals: float [exit row sig], what a policy may declare in `needs` beyond logits, or None.
        signal_names: what each signal is called; a policy gets those that it needs by name.
        ids: one string per row, or None; they say which rows were used for what.
        source: a line that says what was recorded, for reports.
        precision: of the arithmetic that gave the logits; thresholds of one precision do not hold in another.

    Raises:
        ShapeError, ValueRangeError: wrong axes, no rows, labels outside the classes, NaN or infinite logits.
    """

    logits: Float[Tensor, "exit row cls"]
    labels: Int[Tensor, "row"] | None = None
    signals: Float[Tensor, "exit row sig"] | None = None
    signal_names: tuple[str, ...] = ()
    ids: tuple[str, ...] | None = None
    source: str = field(default="")
    precision: str = "fp32"

    def __post_init__(self) -> None:
        logits = check_shape(torch.as_tensor(self.logits), "exit row cls", "logits")
        if not logits.dtype.is_floating_point:
            raise ShapeError(f"logits have dtype {logits.dtype}; expected floats.")
        exits, rows, classes = logits.shape
        if rows == 0:
            raise DataError("the trace has no rows. Record at least one row; check that the data set is not empty.")
        if exits == 0 or classes == 0:
            raise ShapeError(f"logits have shape {list(logits.shape)}; expected at least 1 exit and 1 class.")
        put = object.__setattr__
        put(self, "logits", check_finite(logits.detach().to("cpu", torch.float32), "logits [exit row cls]"))
        if self.labels is not None:
            put(self, "labels", check_labels(torch.as_tensor(self.labels).cpu(), rows, classes))
        if self.signals is not None:
            signals = check_shape(torch.as_tensor(self.signals), "exit row sig", "signals")
            if tuple(signals.shape[:2]) != (exits, rows):
                raise ShapeError(f"signals have shape {list(signals.shape)}; expected [{exits}, {rows}, sig].")
            put(self, "signals", check_finite(signals.detach().to("cpu", torch.float32), "signals [exit row sig]"))
        self._check_names()
        if self.ids is not None:
            put(self, "ids", tuple(str(i) for i in self.ids))
            if len(self.ids) != rows:
                raise ShapeError(f"there are {len(self.ids)} ids for {rows} rows; expected one per row.")

    def _check_names(self) -> None:
        names = tuple(self.signal_names)
        held = 0 if self.signals is None else self.signals.shape[2]
        # signals without any name are kept as they are: nothing that asks by name can use them
        if not all(isinstance(name, str) and name for name in names) or (names and len(names) != held):
            raise ShapeError(f"signal_names are {names}; expected one name for each of {held} signals.")
        if len(set(names)) != len(names):
            raise ShapeError(f"signal_names are {names}; expected different names.")
        object.__setattr__(self, "signal_names", names)

    @property
    def exits(self) -> int:
        """E, the number of exits, the model's own output included."""
        return self.logits.shape[0]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.logits.shape[1]

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.logits.shape[2]

    @property
    def of_tokens(self) -> bool:
        """Whether rows are tokens, with ids such as "12.3", text and place: a class is then another word in each."""
        return self.ids is not None and all(re.fullmatch(r"\d+\.\d+", name) for name in self.ids[:1])

    def known_labels(self, why: str) -> Int64[Tensor, "row"]:
        """The labels int64 [row].

        Raises:
            DataError: there are none; `why` says what they are needed for.
        """
        if self.labels is None:
            raise DataError(f"{why} needs labels, and this trace has none. Record it from labelled data.")
        return self.labels

    def signals_for(self, needs: tuple[str, ...]) -> Float[Tensor, "exit row sig"] | None:
        """The signals that a policy needs, float [exit row sig] in the order of `needs`; None when it needs none.

        Raises:
            ShapeError: the trace does not have one of them by that name.
        """
        if not needs:
            return None
        missing = [name for name in needs if name not in self.signal_names]
        if missing or self.signals is None:
            raise ShapeError(
                f"the trace lacks the signals {', '.join(missing)} that the policy needs; it has "
                f"{', '.join(self.signal_names) or 'none'}. Record it from a model that has them: "
                "learn_certainty(model, data), then record(model, data)."
            )
        if needs == self.signal_names:
            return self.signals
        return self.signals[..., [self.signal_names.index(name) for name in needs]]

    def accuracy(self) -> tuple[float, ...]:
        """Each exit's accuracy on all rows."""
        right = self.logits.argmax(dim=-1) == self.known_labels("accuracy")
        return tuple(right.double().mean(dim=1).tolist())

    def select(self, rows: Tensor) -> "ExitTrace":
        """The trace of some rows: int64 [n] indices, or bool [row].

        Raises:
            ShapeError: there is not one flag per row.
            DataError: no row is selected.
        """
        if rows.dtype == torch.bool and rows.shape != (self.rows,):
            raise ShapeError(f"rows has shape {list(rows.shape)}; expected [{self.rows}], one flag per row.")
        index = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        return ExitTrace(
            logits=self.logits[:, index],
            labels=None if self.labels is None else self.labels[index],
            signals=None if self.signals is None else self.signals[:, index],
            signal_names=self.signal_names,
            ids=None if self.ids is None else tuple(self.ids[i] for i in index.tolist()),
            source=self.source,
            precision=self.precision,
        )

    def split(self, shares: Sequence[float | int] = (0.4, 0.3, 0.3), *, seed: int = 0) -> tuple["ExitTrace", ...]:
        """One trace per share, e.g. (fit, certify, test): seeded, disjoint, each with the classes in proportion.

        Raises:
            DataError: there are too few rows, so that a part has none.
        """
        return tuple(self.select(rows) for rows in self.places(shares, seed=seed))

    def places(self, shares: Sequence[float | int], *, seed: int = 0) -> tuple[Int64[Tensor, "_"], ...]:
        """The rows of each part of `split`."""
        strata = self.labels if self.labels is not None else torch.zeros(self.rows, dtype=torch.int64)
        parts = tuple(stratified_split(strata, tuple(shares), seed=seed))
        if not all(len(part) for part in parts):
            counts = ", ".join(str(len(part)) for part in parts)
            raise DataError(
                f"{self.rows} rows split by {', '.join(f'{s:g}' for s in shares)} leave parts of {counts} rows; every "
                "part needs some. Record more rows, or ask for larger shares."
            )
        return parts

    def check_apart(self, other: "ExitTrace", what: str) -> None:
        """Nothing, when `other` is of the same model and has none of these rows.

        Rows are told apart by their ids where both have them and the same, known source; else only equal
        traces are found.

        Args:
            what: what `other` is, for the message.

        Raises:
            ShapeError: it has other exits or classes.
            DataError: it has rows of this one.
        """
        if not isinstance(other, ExitTrace):
            raise ShapeError(f"the {what} rows are {type(other).__name__}; expected an ExitTrace.")
        if (other.exits, other.classes) != (self.exits, self.classes):
            raise ShapeError(
                f"the {what} rows have {other.exits} exits and {other.classes} classes, the others {self.exits} and "
                f"{self.classes}. Record both from the same model."
            )
        named = self.ids is not None and other.ids is not None and bool(self.source) and self.source == other.source
        both = set(self.ids or ()) & set(other.ids or ()) if named else ()
        if both or torch.equal(self.logits, other.logits):
            count = len(both) or other.rows
            raise DataError(
                f"{count} of {other.rows} {what} rows are also used for something else, so what is said of them would "
                "not hold for new rows. Give rows that nothing else has seen."
            )

    def save(self, path: str | Path, *, half: bool = False) -> Path:
        """The path, after the trace was written to it as safetensors (atomically).

        Args:
            half: logits and signals as float16 and labels as int16, half the size; they then keep three digits.

        Raises:
            ValueRangeError: a logit is too large for float16, or a label for int16.
        """
        tensors = {"logits": self.logits.contiguous()}
        if self.labels is not None:
            tensors["labels"] = self.labels.contiguous()
        if half:
            if self.classes > 32767:
                raise ValueRangeError(f"labels of {self.classes} classes do not fit int16; use half=False.")
            tensors["logits"] = check_finite(tensors["logits"].half(), "logits as float16")
            if self.labels is not None:
                tensors["labels"] = self.labels.to(torch.int16).contiguous()
        if self.signals is not None:
            tensors["signals"] = (self.signals.half() if half else self.signals).contiguous()
        about = {"kind": KIND, "version": str(VERSION), "source": self.source}
        if self.precision != "fp32":
            about["precision"] = self.precision
        if self.ids is not None:
            about["ids"] = json.dumps(self.ids)
        if self.signal_names:
            about["signal_names"] = json.dumps(self.signal_names)
        return write_atomically(path, lambda partial: save_file(tensors, partial, metadata=about))

    @classmethod
    def load(cls, path: str | Path) -> "ExitTrace":
        """The trace in a file that `save` wrote.

        Raises:
            FormatError: the file is missing, damaged, not a trace, or from a newer version.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except FileNotFoundError:
            raise FormatError(f"{path} does not exist. Record a trace first, or check the path.") from None
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} is not a readable safetensors file: {error}. Record the trace again.") from None
        if about.get("kind") != KIND or not {"logits"} <= set(tensors) <= {"logits", "labels", "signals"}:
            raise FormatError(f"{path} holds {sorted(tensors)}, not an exit trace. Give a file that record wrote.")
        if about.get("version") != str(VERSION):
            raise FormatError(f"{path} is a trace of version {about.get('version')}; this Offramp reads {VERSION}.")
        try:
            ids = tuple(json.loads(about["ids"])) if "ids" in about else None
            names = tuple(json.loads(about.get("signal_names", "[]")))
            source, precision = about.get("source", ""), about.get("precision", "fp32")
            return cls(ids=ids, source=source, signal_names=names, precision=precision, **tensors)
        except (ValueError, TypeError, RecursionError) as error:
            raise FormatError(f"{path} is a damaged trace: {error} Record it again.") from None
