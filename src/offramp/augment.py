"""Image batches: random crops and flips, and scaling to what a network expects."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped, UInt8
from torch import Generator, Tensor

from offramp.errors import ShapeError, ValueRangeError

__all__ = ["CropFlip", "Normalise"]


@dataclass(frozen=True)
class CropFlip:
    """Random crops of the padded image, half of them mirrored; the usual augmentation of small photographs.

    Example: `Recipe(augment=CropFlip(padding=4))`.
    """

    padding: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.padding, int) or isinstance(self.padding, bool) or self.padding < 0:
            raise ValueRangeError(
                f"CropFlip.padding is {self.padding!r}; expected a whole number of pixels, 0 or more."
            )

    def __call__(
        self, images: Shaped[Tensor, "batch ch height width"], generator: Generator
    ) -> Shaped[Tensor, "batch ch height width"]:
        """Images of the same shape and dtype, each cropped and mirrored by its own draw from the generator (CPU).

        Raises:
            ShapeError: `images` is not a tensor with four axes.
        """
        if images.ndim != 4:
            raise ShapeError(f"images have shape {list(images.shape)}; expected [batch ch height width].")
        batch, _, height, width = images.shape
        down, right = (torch.randint(0, 2 * self.padding + 1, (batch, 1), generator=generator) for _ in range(2))
        mirrored = torch.rand((batch, 1), generator=generator) < 0.5
        y = down + torch.arange(height)
        x = torch.arange(width).expand(batch, width)
        x = right + torch.where(mirrored, width - 1 - x, x)
        padded = F.pad(images, (self.padding,) * 4)
        rows = torch.arange(batch).view(-1, 1, 1)
        # One gather does the crop and the flip; channels go last for it and come back.
        return padded.permute(0, 2, 3, 1)[rows, y.unsqueeze(2), x.unsqueeze(1)].permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Normalise:
    """Bytes 0..255 as floats with the given mean and standard deviation per channel subtracted and divided out."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean or not all(s > 0 for s in self.std):
            raise ValueRangeError(
                f"Normalise has mean {self.mean} and std {self.std}; expected one of each per channel, std above 0."
            )

    def __call__(self, images: UInt8[Tensor, "batch ch height width"]) -> Float[Tensor, "batch ch height width"]:
        """The images as float32."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images.float() / 255.0 - mean) / std
