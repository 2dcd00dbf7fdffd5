"""The handwritten digits that scikit-learn ships: 1,797 real images, no download."""

from __future__ import annotations

import json
from importlib import resources

import torch
from torch import Tensor

from fastokd.data.preprocessing import preprocessing_of
from fastokd.data.splits import DatasetSplits, Split


def digits_pixels() -> tuple[Tensor, Tensor]:
    """``(pixels_NHW, labels_N)`` as scikit-learn has them: float32 [1797, 8, 8], 0 to 16."""
    from sklearn.datasets import load_digits  # seconds to import, so only where asked for

    digits = load_digits()
    pixels_NHW = torch.from_numpy(digits.images).float()
    assert pixels_NHW.shape == (1797, 8, 8)
    return pixels_NHW, torch.from_numpy(digits.target).long()


def digits_indices() -> dict[str, Tensor]:
    """The committed split: indices of 500 images to train, 297 to validate, 1,000 to test."""
    text = resources.files("fastokd.data.sets").joinpath("digits_split.json").read_text("utf-8")
    split = json.loads(text)
    return {name: torch.tensor(split[name]) for name in ("train", "val", "test")}


def load_digits_splits() -> DatasetSplits:
    """The digits as 3x32x32, enlarged by bicubic interpolation."""
    pixels_NHW, labels_N = digits_pixels()
    shown = preprocessing_of("digits")
    whole = Split(shown.from_native(pixels_NHW), labels_N)
    splits = {name: whole.select(indices) for name, indices in digits_indices().items()}
    return DatasetSplits(
        name="digits",
        class_names=tuple(str(digit) for digit in range(10)),
        preprocessing=shown,
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        note="scikit-learn's digits, in a fixed split: 500 to train, 297 to validate, 1,000 to test",
    )
