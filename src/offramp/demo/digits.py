"""1,797 handwritten digits, 8x8, from the UCI machine learning repository (CC BY 4.0), as scikit-learn carries them."""

from importlib import resources

import numpy as np
import torch
from torch.nn import functional as F

from offramp.data import Examples
from offramp.splits import stratified_split

__all__ = ["digits"]

#: Shares of train, calibrate and test rows.
SHARES = (0.5, 0.2, 0.3)


def digits(size: int = 32, *, seed: int = 0) -> tuple[Examples, Examples, Examples]:
    """(train, calibrate, test) rows: float images [row 1 size size] of zero mean and unit spread, labels 0..9.

    Source: E. Alpaydin and C. Kaynak 1998, Optical Recognition of Handwritten Digits, UCI.
    """
    with resources.files("offramp.demo").joinpath("digits.npz").open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        raw, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"]).long()
    images = F.interpolate(raw[:, None].float() / 16.0, size=(size, size), mode="bilinear", align_corners=False)
    images = (images - 0.305) / 0.376
    parts = stratified_split(labels, SHARES, seed=seed)
    train, calibrate, test = (Examples(images[rows], labels[rows], ids=rows) for rows in parts)
    return train, calibrate, test
