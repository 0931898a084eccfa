"""An exported file under onnxruntime: `OnnxFile("film.onnx")(inputs) -> Prediction`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from offramp.errors import FormatError, MissingExtra, ShapeError, ValueRangeError, first_line
from offramp.inputs import Inputs, batch_size, names_of, tensors_of
from offramp.onnx.about import parse_about
from offramp.prediction import Prediction, check_finite, no_rows

__all__ = ["OnnxFile", "about_options", "cannot_answer", "session_options", "with_runtime"]


#: The types of a file's inputs.
KINDS = {
    "tensor(float)": torch.float32, "tensor(double)": torch.float64, "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64, "tensor(int32)": torch.int32, "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8, "tensor(uint8)": torch.uint8, "tensor(bool)": torch.bool,
}  # fmt: skip


class OnnxFile:
    """A file of `export`: the same call and the same predictions as `Runtime`.

    It may be called from several threads at once.

    Args:
        path: of the file, or what is in it.
        threads: that one call may use; as many as torch's unless given.

    Raises:
        MissingExtra: onnxruntime is not installed.
        FormatError: the file is no ONNX file, or not of Offramp.
    """

    def __init__(self, path: str | Path | bytes, *, threads: int | None = None) -> None:
        ort = with_runtime()
        name = "the file" if isinstance(path, bytes) else str(path)
        if not isinstance(path, bytes) and not Path(path).is_file():
            raise FormatError(f"{path} does not exist. Export a bundle: offramp export BUNDLE {path}")
        try:
            self._session = ort.InferenceSession(
                path if isinstance(path, bytes) else name, session_options(threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own kinds
            raise FormatError(f"onnxruntime cannot read {name}: {first_line(error)}") from error
        self.about = parse_about(self._session.get_modelmeta().custom_metadata_map, name)
        self.labels: tuple[str, ...] = tuple(self.about.get("labels", ()))
        self.exits: int = self.about["exits"]
        self._kinds = {i.name: i for i in self._session.get_inputs()}
        self._names = tuple(self._kinds)

    def __call__(self, inputs: Inputs, *, thresholds: Any = None) -> Prediction:
        """The answers of one batch, in the order of its rows.

        Args:
            inputs: a tensor [batch ...] or a mapping of tensors, as the network takes them.
            thresholds: one for each exit, or one for all, instead of the policy's own.

        Raises:
            ShapeError: a name, a shape or a length differs from what was exported.
            ValueRangeError: an answer is NaN or infinite, or an input has values that the network does not take.
        """
        if batch_size(inputs) == 0:
            return no_rows(int(self.about["classes"]))
        feeds = self._feeds(inputs)
        if thresholds is not None:
            feeds["thresholds"] = self._thresholds(thresholds)
        try:
            out = self._session.run(None, feeds)
        except Exception as error:  # onnxruntime's own kinds
            raise cannot_answer(error) from error
        label, probabilities, exit_, score = map(torch.from_numpy, out)
        check_finite(probabilities)
        return Prediction(label, probabilities, exit_, score)

    def _feeds(self, inputs: Inputs) -> dict[str, np.ndarray]:
        tensors = dict(zip(names_of(inputs), tensors_of(inputs), strict=True))
        if set(tensors) != set(self._names):
            raise ShapeError(f"Inputs are {list(tensors)}; expected {list(self._names)}, as in the export.")
        known: dict[str, int] = {}
        for name, tensor in tensors.items():
            expected = self._kinds[name].shape
            fits = len(expected) == tensor.ndim and all(
                known.setdefault(length, n) == n if isinstance(length, str) else length == n
                for length, n in zip(expected, tensor.shape, strict=True)
            )
            if not fits:
                raise ShapeError(
                    f"Input {name!r} has shape {list(tensor.shape)}; the file was exported for {expected}."
                )
        for word, (least, most) in self.about["lengths"].items():
            if word in known and not least <= known[word] <= (most or known[word]):
                limit = "" if most is None else f", {most} at most"
                raise ShapeError(f"An input is {known[word]} long; the file takes {least} or more{limit}.")
        return {name: self._array(name, tensor) for name, tensor in tensors.items()}

    def _array(self, name: str, tensor: torch.Tensor) -> np.ndarray:
        """The tensor in the type that the file takes; whole numbers may come in any width."""
        wanted, got = KINDS[self._kinds[name].type], tensor.dtype
        if got is not wanted and any(kind.is_floating_point or kind.is_complex for kind in (wanted, got)):
            raise ShapeError(f"Input {name!r} is {got}; the file was exported for {wanted}. Cast the input.")
        return tensor.detach().to("cpu", wanted).contiguous().numpy()

    def _thresholds(self, given: Any) -> np.ndarray:
        found = np.asarray(given, dtype=np.float32)
        found = np.full(self.exits, found) if found.ndim == 0 else found
        if found.shape != (self.exits,) or np.isnan(found).any():
            raise ShapeError(f"thresholds are {given!r}; expected one number, or one for each of {self.exits} exits.")
        return found


def with_runtime() -> Any:
    """The module `onnxruntime`.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("running an ONNX file needs onnxruntime: pip install 'offramp[onnx]'.") from None
    return onnxruntime


def cannot_answer(error: Exception) -> ValueRangeError:
    """What onnxruntime says of inputs whose shapes are right."""
    return ValueRangeError(
        f"onnxruntime cannot answer these inputs: {first_line(error)}. Look for token ids that are not below the "
        "vocabulary's size."
    )


def session_options(threads: int | None = None) -> Any:
    """Options of a session that shares the machine: threads that sleep when there is nothing to do, one operator at a
    time. Sessions that spin take the cores from each other (measured: 6 ms became 56)."""
    options = with_runtime().SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def about_options(options: Any) -> str:
    """The threads of a session in words."""
    spins = options.get_session_config_entry("session.intra_op.allow_spinning") != "0"
    return (
        f"{options.intra_op_num_threads} threads within an operator, {options.inter_op_num_threads} across; they "
        f"{'spin' if spins else 'sleep'} while they wait"
    )
