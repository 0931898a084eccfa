"""The files of a bundle besides its manifest and policies: example, preprocessing, tensors."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from offramp.bundle.model import BundledModel
from offramp.bundle.store import Manifest
from offramp.errors import FormatError, first_line
from offramp.inputs import Inputs, names_of, tensors_of
from offramp.preprocess import Preprocess, load_preprocess
from offramp.record import to_device

__all__ = ["compare", "example_tensors", "read_example", "read_preprocess", "read_tensors"]

TOLERANCE = {torch.bfloat16: 1e-1, torch.float16: 2e-2}  # relative to the largest logit; 1e-3 for wider types


def example_tensors(inputs: Inputs, logits: Tensor, signals: Tensor | None = None) -> dict[str, Tensor]:
    """What `read_example` reads: the example's inputs, and the logits [exit batch cls] and the signals [exit batch sig]
    that the model gave."""
    rows = dict(zip((f"input/{name}" for name in names_of(inputs)), tensors_of(inputs), strict=True))
    said = {"logits": logits} | ({} if signals is None else {"signals": signals})
    return {name: tensor.contiguous() for name, tensor in {**rows, **said}.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FormatError: it is not one.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise FormatError(f"{path.name} is not a readable safetensors file: {error}") from None


def read_example(tensors: Mapping[str, Tensor]) -> tuple[Inputs, Tensor, Tensor | None]:
    """(inputs, logits [exit batch cls], signals [exit batch sig] or None) of the example.

    Raises:
        FormatError: they are not there.
    """
    rows = {name.removeprefix("input/"): tensor for name, tensor in tensors.items() if name.startswith("input/")}
    if "logits" not in tensors or not rows or tensors["logits"].ndim != 3:
        raise FormatError("its example is damaged.")
    return (rows["input"] if list(rows) == ["input"] else rows), tensors["logits"], tensors.get("signals")


def read_preprocess(manifest: Manifest) -> Preprocess | None:
    """The preprocessing of a bundle, or None.

    Raises:
        FormatError: it is damaged.
    """
    roles = [role for role in manifest.files if role.startswith("preprocess/")]
    if not roles:
        return None
    with tempfile.TemporaryDirectory() as scratch:  # the files have their own names there, without checksums
        for role in roles:
            shutil.copyfile(manifest.path(role), Path(scratch) / role.removeprefix("preprocess/"))
        return load_preprocess(Path(scratch))


def compare(model: BundledModel, inputs: Inputs, expected: Tensor, signals: Tensor | None = None) -> None:
    """Nothing, when the model gives the logits [exit batch cls] that were written down, and the signals.

    Raises:
        FormatError: it does not run, or gives others.
    """
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            logits, beside = model.forward_with_signals(to_device(inputs, device))
    except (RuntimeError, TypeError, ValueError, IndexError, ArithmeticError, AttributeError, MemoryError) as error:
        told = first_line(error)
        raise FormatError(f"its programs do not run on its own example: {told}") from None
    dtype = next(model.parameters()).dtype
    _same(logits.cpu().float(), expected.float(), "logits", dtype)
    if (beside is None) != (signals is None):
        raise FormatError("its programs and its example do not have the same signals.")
    if beside is not None and signals is not None:
        _same(beside.cpu(), signals.float(), "signals", dtype)


def _same(got: Tensor, expected: Tensor, what: str, dtype: torch.dtype) -> None:
    if got.shape != expected.shape:
        raise FormatError(f"its programs give {list(got.shape)} on its example; expected {list(expected.shape)}.")
    bound = TOLERANCE.get(dtype, 1e-3) * float(expected.abs().max().clamp(min=1e-6))
    apart = float((got - expected).abs().max())
    if not apart <= bound:
        raise FormatError(
            f"its model answers otherwise here: the {what} of its example are {apart:.2g} apart; expected at most "
            f"{bound:.2g}."
        )
