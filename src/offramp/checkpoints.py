"""The state of a training run in one file: weights, optimizer and place. Safetensors with JSON, never pickle."""

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from offramp.artefacts import write_atomically
from offramp.errors import FormatError

__all__ = ["FILE", "load", "model_digest", "named_tensors", "restore_optimizer", "save"]

FILE = "train.safetensors"
VERSION = 1


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of the backbone and the heads once, by name, shared ones under their first name."""
    seen: set[int] = set()
    for part in ("backbone", "heads"):
        module = getattr(model, part)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{part}.{name}", tensor


def model_digest(model: nn.Module) -> str:
    """A checksum of the names, shapes and dtypes of the model's tensors."""
    text = json.dumps([(name, list(t.shape), str(t.dtype)) for name, t in named_tensors(model)])
    return f"crc32 {zlib.crc32(text.encode()):08x}"


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, run: Mapping[str, Any], place: Mapping[str, Any]
) -> Path:
    """The file, after the state of the run was written to it in one rename.

    Args:
        run: what makes this run this run; another run's checkpoint is refused by it.
        place: how far the run has come.
    """
    tensors = {f"model/{name}": _plain(tensor) for name, tensor in named_tensors(model)}
    numbers: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = _plain(value)
            elif value is not None:
                numbers[f"{index}/{key}"] = value
    header = {"version": VERSION, "run": run, "place": place, "numbers": numbers, "crc32": _checksum(tensors)}
    metadata = {"offramp": json.dumps(header, allow_nan=False)}
    return write_atomically(folder / FILE, lambda partial: save_file(tensors, partial, metadata=metadata))


def load(folder: Path, model: nn.Module, run: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The place of the run and the state of its optimizer, after the weights went into the model; None without a file.

    Raises:
        FormatError: the file is damaged, is from a newer version, or belongs to another run.
    """
    path = folder / FILE
    if not path.exists():
        return None
    way_out = f"Delete {path}, give another checkpoint directory, or pass resume=False (--no-resume) to start again."
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["offramp"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        version, theirs, place = header["version"], header["run"], header["place"]
        whole = header["crc32"] == _checksum(tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"the checkpoint {path} is damaged ({type(error).__name__}: {error}). {way_out}") from None
    if version != VERSION:
        raise FormatError(f"the checkpoint {path} has version {version!r}; this Offramp reads {VERSION}. {way_out}")
    if not whole:
        raise FormatError(f"the checkpoint {path} is damaged: its checksum is wrong. {way_out}")
    ours = json.loads(json.dumps(run))
    if theirs != ours:
        raise FormatError(f"the checkpoint {path} is another run's: {_difference(theirs, ours)}. {way_out}")
    with torch.no_grad():
        for name, tensor in named_tensors(model):
            tensor.copy_(tensors[f"model/{name}"])
    return place, {"tensors": tensors, "numbers": header["numbers"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Nothing; the optimizer goes on from the state that `load` returned."""
    state: dict[int, dict[str, Any]] = {}
    moments = {k.removeprefix("optimizer/"): v for k, v in saved["tensors"].items() if k.startswith("optimizer/")}
    for name, value in {**moments, **saved["numbers"]}.items():
        index, key = name.split("/", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(memoryview(_bytes(tensors[name])), zlib.crc32(name.encode(), crc))
    return crc


def _bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor of any dtype, also of those that numpy does not know."""
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""


def _difference(theirs: Any, ours: Mapping[str, Any]) -> str:
    """The first few fields that are not the same."""
    if not isinstance(theirs, Mapping):
        return "it does not say which"
    found: list[str] = []
    for key in ours:
        a, b = theirs.get(key), ours[key]
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += [f"{key}.{k} was {a.get(k)!r}, now {b.get(k)!r}" for k in {**a, **b} if a.get(k) != b.get(k)]
        else:
            found.append(f"{key} was {a!r}, now {b!r}")
    return "; ".join(found[:3]) or "it has other fields"
