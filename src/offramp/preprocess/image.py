"""Image files as tensors: decoded by Pillow, turned upright, resized, cropped, scaled and normalised."""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from offramp.errors import DataError, MissingExtra, ValueRangeError, first_line
from offramp.preprocess.base import Row, check_names, write_fields

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImagePreprocess"]

LARGEST = 4096
FITS = ("stretch", "crop", "center")
MODES = {"RGB": 3, "L": 1}
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


@dataclass(frozen=True)
class ImagePreprocess:
    """One image as float32 [ch height width]: (pixel * scale - mean) / std.

    Args:
        size: (height, width) of what the model takes.
        mode: "RGB" or "L" (grey); images of other modes are converted, transparent ones on white.
        fit: "stretch" to the size; "crop": scale the shorter side to it and cut the middle out; "center": scale the
            shorter side to `shorter` first.
        shorter: for "center", the length of the shorter side before the cut.
        resample: of Pillow: nearest, bilinear, bicubic, lanczos, box or hamming.
        scale: of a pixel of 0 to 255.
        mean, std: one per channel, after scaling.
        column: which column of a row holds the path, the bytes, or a mapping with `bytes` or `path`.
        name: keyword of the model, or None when it takes the tensor alone.

    Raises:
        ValueRangeError: a value is out of its range.
    """

    kind: ClassVar[str] = "image"

    size: tuple[int, int]
    mode: str = "RGB"
    fit: str = "crop"
    shorter: int | None = None
    resample: str = "bilinear"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    column: str = "image"
    name: str | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "size", tuple(self.size))
        sizes = (*self.size, *(() if self.shorter is None else (self.shorter,)))
        if len(self.size) != 2 or not all(type(n) is int and 0 < n <= LARGEST for n in sizes):
            raise ValueRangeError(f"the size is {self.size}; expected (height, width) of 1 to {LARGEST}.")
        known = self.mode in MODES and self.fit in FITS and self.resample in RESAMPLING
        if not known or (self.fit == "center") != (self.shorter is not None):
            raise ValueRangeError(
                f"mode {self.mode!r}, fit {self.fit!r} (shorter {self.shorter}), resample {self.resample!r}; expected "
                f"of {', '.join(MODES)}, of {', '.join(FITS)} (center has shorter), of {', '.join(RESAMPLING)}."
            )
        channels = MODES[self.mode]
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            values = values * channels if len(values) == 1 else values
            if len(values) != channels or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
                raise ValueRangeError(f"{name} is {values}; expected {channels} finite numbers, std above 0.")
            put(self, name, values)
        if not math.isfinite(self.scale) or self.scale <= 0:
            raise ValueRangeError(f"scale is {self.scale}; expected a finite number above 0.")
        check_names((self.column, *(() if self.name is None else (self.name,))), "column")

    @classmethod
    def of(cls, config: Mapping[str, Any], *, column: str = "image", name: str | None = None) -> "ImagePreprocess":
        """The preprocessing that a transformers `preprocessor_config.json` describes.

        Raises:
            ValueRangeError: it describes something else than resizing, a crop in the middle, scaling, normalising.
        """
        size, crop = config.get("size", 224), config.get("crop_size")
        whole, shorter = _sizes(size)
        if config.get("do_center_crop") and crop is not None:
            target, edge = _sizes(crop)
            final = target or (edge, edge)
            # a size of both sides is stretched to before the crop; only an equal crop is the same as none
            if whole is not None and whole != final:
                raise ValueRangeError(f"the image processor stretches to {whole} and crops {final}; this is not read.")
            fit, before = ("stretch", None) if whole is not None else ("center", shorter)
        elif whole is not None:
            fit, before, final = "stretch", None, whole
        else:
            fit, before, final = "crop", None, (shorter, shorter)
        if config.get("do_resize", True) is False:
            raise ValueRangeError("the image processor does not resize; images of one size are expected. Turn it on.")
        normalise = config.get("do_normalize", True)
        resample = {number: word for word, number in RESAMPLING.items()}[int(config.get("resample", 2))]
        return cls(
            size=final,
            fit=fit,
            shorter=before,
            resample=resample,
            scale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
            mean=tuple(config.get("image_mean") or (0.0,)) if normalise else (0.0,),
            std=tuple(config.get("image_std") or (1.0,)) if normalise else (1.0,),
            column=column,
            name=name,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The one column that it reads."""
        return (self.column,)

    def check(self, row: Row) -> str | None:
        """Why a row cannot be used, or None when it can; the image is decoded whole."""
        try:
            self._opened(row)
        except DataError as error:
            return str(error).rstrip(".")
        return None

    def pixels(self, row: Row) -> Tensor:
        """The image of a row, uint8 [ch height width], resized and cropped but not yet normalised.

        Raises:
            DataError: it cannot be read.
        """
        image = self._fitted(self._opened(row))
        values = torch.from_numpy(np.array(image, dtype=np.uint8)).reshape(image.height, image.width, -1)
        return values.permute(2, 0, 1).contiguous()

    def normalise(self, pixels: Tensor) -> Any:
        """Pixels uint8 [... ch height width] as the model takes them: float32, by name if it wants a name."""
        mean, std = (torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (self.mean, self.std))
        images = (pixels.float() * self.scale - mean) / std
        return images if self.name is None else {self.name: images}

    def batch(self, rows: Sequence[Row]) -> Any:
        """The images float32 [batch ch height width], by name if the model wants a name.

        Raises:
            DataError: one cannot be read.
        """
        empty = torch.zeros(0, MODES[self.mode], *self.size, dtype=torch.uint8)
        return self.normalise(torch.stack([self.pixels(row) for row in rows]) if rows else empty)

    def save(self, folder: Path) -> None:
        """Nothing; preprocess.json is in the folder."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "kind"}
        write_fields(folder, self.kind, fields)

    def _opened(self, row: Row) -> "Image":
        """The image of a row, decoded, upright, in the mode."""
        try:
            from PIL import Image, ImageOps
        except ImportError:
            raise MissingExtra("images need Pillow: pip install 'offramp[image]'.") from None
        where, source = _source(row.get(self.column), self.column)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(source) as image:
                    image.load()
                    upright = ImageOps.exif_transpose(image)
                return _in_mode(upright, self.mode)
        except Exception as error:  # Pillow's decoders raise many kinds
            if isinstance(error, MemoryError):
                raise
            told = first_line(error, 160)
            raise DataError(f"{where} is no image that can be read: {told}.") from None

    def _fitted(self, image: "Image") -> "Image":
        height, width = self.size
        if self.fit == "stretch":
            return image.resize((width, height), RESAMPLING[self.resample])
        if self.fit == "crop":
            scale = max(height / image.height, width / image.width)
        else:
            scale = (self.shorter or 1) / min(image.height, image.width)
        grown = (max(1, int(image.width * scale + 1e-6)), max(1, int(image.height * scale + 1e-6)))
        if self.fit == "crop":
            grown = (max(grown[0], width), max(grown[1], height))
        if max(grown) > 16 * LARGEST:
            raise DataError(f"an image of {image.width} x {image.height} is too long and thin to be scaled.")
        image = image.resize(grown, RESAMPLING[self.resample])
        left, top = math.floor((image.width - width) / 2), math.floor((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))


def _sizes(value: Any) -> tuple[tuple[int, int] | None, int]:
    """((height, width) or None, the shorter side or 0) of a size in an image processor's words."""
    if isinstance(value, int):
        return (value, value), 0
    if isinstance(value, Mapping) and "height" in value:
        return (int(value["height"]), int(value["width"])), 0
    if isinstance(value, Mapping) and "shortest_edge" in value and "longest_edge" not in value:
        return None, int(value["shortest_edge"])
    raise ValueRangeError(f"the image processor has the size {value}; expected height and width, or shortest_edge.")


def _source(value: Any, column: str) -> tuple[str, Any]:
    """(what a message calls it, what Pillow opens)."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray | memoryview):
        return f"column {column!r}", io.BytesIO(value)
    if isinstance(value, str | Path) and str(value):
        path = Path(value)
        if not path.is_file():
            raise DataError(f"{path} does not exist, or is no file.")
        return str(path), path
    raise DataError(f"column {column!r} is {type(value).__name__}; expected a path or the bytes of an image.")


def _in_mode(image: "Image", mode: str) -> "Image":
    """The image in RGB or grey; 16 bits are brought to 8, transparency is put on white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if image.mode.startswith("I") else max(1.0, float(values.max(initial=1.0)))
        image = Image.fromarray(np.clip(values * (255.0 / top), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, (255, 255, 255, 255)), clear)
    return image.convert(mode)
