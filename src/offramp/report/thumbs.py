"""A row of a data set as a person sees it: its text, or a small picture."""

import base64
import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["shown_row"]

SIDE = 96  # pixels of the shorter side, at least
LONGEST = 600  # characters of a text


def shown_row(rows: Any, row: int, decode: Callable[[list[int]], str] | None) -> tuple[str, str]:
    """(text, data URI of a picture), either of them "" where a row is not of that kind.

    Args:
        rows: what a job loads.
        row: its number.
        decode: from token ids to a text.
    """
    inputs = rows[row][0]
    if isinstance(inputs, Mapping):
        if "input_ids" in inputs and decode is not None:
            text = decode([int(i) for i in inputs["input_ids"]])
            return (text[:LONGEST] + " ..." if len(text) > LONGEST else text), ""
        inputs = inputs.get("pixel_values")
    if isinstance(inputs, Tensor) and inputs.ndim == 3 and inputs.shape[0] in (1, 3):
        return "", _picture(inputs)
    if isinstance(inputs, Tensor) and inputs.ndim == 1:
        shown = ", ".join(f"{float(value):.3g}" for value in inputs[:12])
        return shown + (", ..." if len(inputs) > 12 else ""), ""
    return "", ""


def _picture(pixels: Tensor) -> str:
    """A tensor [ch height width] of any range as a small PNG."""
    try:
        from PIL import Image
    except ImportError:
        return ""
    values = pixels.detach().float()
    low, high = float(values.min()), float(values.max())
    scaled = ((values - low) / max(high - low, 1e-6) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(scaled[:, :, 0] if scaled.shape[2] == 1 else scaled)
    shorter = min(image.size)
    if shorter < SIDE:
        image = image.resize((image.width * (-(-SIDE // shorter)), image.height * (-(-SIDE // shorter))), 0)
    elif shorter > 2 * SIDE:
        image.thumbnail((2 * SIDE, 2 * SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
