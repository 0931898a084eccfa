"""A network that is taught by itself: by what it was when a stage of training began."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from offramp.artefacts import write_atomically
from offramp.data import Examples
from offramp.errors import FormatError
from offramp.inputs import Inputs
from offramp.recipe import Recipe
from offramp.record import predict
from offramp.taps import logits_of

__all__ = ["FILE", "own_teacher"]

FILE = "teacher.safetensors"


class _Alone(nn.Module):
    """A network without exits, as something with one exit."""

    exits = 1

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Inputs) -> Tensor:
        said = self.network(inputs) if isinstance(inputs, Tensor) else self.network(**inputs)
        return logits_of(said, self.network).unsqueeze(0)


def own_teacher(
    backbone: nn.Module, data: Any, recipe: Recipe, folder: Path | None, *, resumed: bool, keep: bool = True
) -> nn.Module | Tensor:
    """The backbone as it is now, or as the folder keeps it, as a teacher: its logits [row cls] where every epoch sees
    the same inputs, else a copy.

    Args:
        folder: of the training's checkpoint, which a run that goes on needs; None keeps nothing.
        resumed: the stage had begun already, so the teacher is the one in the folder.
        keep: whether this process writes to the folder.

    Raises:
        FormatError: the file in the folder is missing, damaged or of another network.
    """
    teacher = copy.deepcopy(backbone).eval()
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    if folder is not None:
        if resumed:
            _load(folder / FILE, teacher)
        elif keep:
            write_atomically(folder / FILE, lambda path: save_file(_tensors(teacher), path))
    alone = _Alone(teacher)
    if not isinstance(data, Examples) or recipe.augment is not None:
        return alone
    logits, _ = predict(alone, data, batch_size=max(64, recipe.batch_size), precision=recipe.precision)
    return logits[0]


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Every tensor once, by the first name that it has."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach().cpu().contiguous()
    return found


def _load(path: Path, network: nn.Module) -> None:
    try:
        saved = load_file(path)
        with torch.no_grad():
            for name, tensor in (*network.named_parameters(), *network.named_buffers()):
                if name in saved:
                    tensor.copy_(saved[name])
        whole = set(saved) == set(_tensors(network))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise FormatError(
            f"the teacher of this training, {path}, cannot be read ({type(error).__name__}). Start again with "
            "resume=False (--no-resume)."
        ) from None
    if not whole:
        raise FormatError(f"{path} is of another network. Start again with resume=False (--no-resume).")
