"""The handwritten digits that scikit-learn ships: 1,797 real images, no download."""

from __future__ import annotations

import json
from importlib import resources

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.data.splits import DatasetSplits, Split

# Of the 500 training images as the students see them; a test holds them to the data.
MEAN, STD = (0.3101,) * 3, (0.3542,) * 3


def digits_pixels() -> tuple[Tensor, Tensor]:
    """``(pixels_NHW, labels_N)`` as scikit-learn has them: float32 [1797, 8, 8], 0 to 16."""
    from sklearn.datasets import load_digits  # seconds to import, so only where asked for

    digits = load_digits()
    pixels_NHW = torch.from_numpy(digits.images).float()
    assert pixels_NHW.shape == (1797, 8, 8)
    return pixels_NHW, torch.from_numpy(digits.target).long()


def digits_indices() -> dict[str, Tensor]:
    """The committed split: indices of 500 images to train, 297 to validate, 1,000 to test."""
    text = resources.files("fastokd.data").joinpath("digits_split.json").read_text("utf-8")
    split = json.loads(text)
    return {name: torch.tensor(split[name]) for name in ("train", "val", "test")}


def load_digits_splits() -> DatasetSplits:
    """The digits as 3x32x32, enlarged by bicubic interpolation."""
    pixels_NHW, labels_N = digits_pixels()
    # Bicubic overshoots at the edges of a stroke, hence the clamp.
    large_N1HW = F.interpolate(
        pixels_NHW[:, None] * (255 / 16), size=(32, 32), mode="bicubic", align_corners=False
    )
    grey_NHW1 = large_N1HW.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    whole = Split(grey_NHW1.expand(-1, -1, -1, 3).contiguous(), labels_N)
    splits = {name: whole.select(indices) for name, indices in digits_indices().items()}
    return DatasetSplits(
        name="digits",
        class_names=tuple(str(digit) for digit in range(10)),
        mean=MEAN,
        std=STD,
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        note="committed split of scikit-learn's digits",
    )
