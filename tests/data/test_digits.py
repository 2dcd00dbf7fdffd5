"""The digits: the committed split, frozen, and images that are the digits still."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from fastokd.data import load_dataset
from fastokd.data.sets.digits import digits_indices, digits_pixels
from fastokd.data.sets.folder import channel_statistics
from fastokd.data.splits import stratified_split
from fastokd.errors import UserError

pytestmark = pytest.mark.usefixtures("all_digits")


def test_split_is_frozen() -> None:
    indices = digits_indices()
    assert {name: len(index) for name, index in indices.items()} == {
        "train": 500,
        "val": 297,
        "test": 1000,
    }
    joined = torch.cat(list(indices.values()))
    assert torch.equal(joined.sort().values, torch.arange(1797))
    assert zlib.crc32(joined.numpy().astype("<i4").tobytes()) == SPLIT


def test_scikit_learns_digits_are_frozen() -> None:
    """Indices mean nothing if the data behind them change."""
    pixels_NHW, labels_N = digits_pixels()
    assert zlib.crc32(pixels_NHW.numpy().astype(np.uint8).tobytes()) == PIXELS
    assert zlib.crc32(labels_N.numpy().astype(np.uint8).tobytes()) == LABELS


SPLIT, PIXELS, LABELS = 4243226646, 4087501628, 4168075561


def test_split_follows_its_rule() -> None:
    _, labels_N = digits_pixels()
    rest, test = stratified_split(labels_N, 1000, seed=1)
    train, val = stratified_split(labels_N[rest], 297, seed=1)
    indices = digits_indices()
    assert torch.equal(indices["test"], test)
    assert torch.equal(indices["val"], rest[val])
    assert torch.equal(indices["train"], rest[train])


def test_images() -> None:
    splits = load_dataset("digits")
    assert splits.val is not None
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [500, 297, 1000]
    assert splits.num_classes == 10
    pixels_NHW, labels_N = digits_pixels()
    index_N = digits_indices()["test"]
    images_NHWC = splits.test.images_NHWC
    assert images_NHWC.shape == (1000, 32, 32, 3)
    assert torch.equal(splits.test.labels_N, labels_N[index_N])
    assert torch.equal(images_NHWC[..., 0], images_NHWC[..., 2])
    # Averaged back over 4x4 blocks, each is nearest to the very digit that it was made of.
    blocks_NP = images_NHWC[..., 0].double().view(-1, 8, 4, 8, 4).mean((2, 4)).flatten(1) / 255 * 16
    distance_NN = torch.cdist(blocks_NP, pixels_NHW[index_N].double().flatten(1))
    assert torch.equal(distance_NN.argmin(1), torch.arange(1000))
    assert images_NHWC.min() == 0
    assert images_NHWC.max() == 255


def test_statistics_are_those_of_train() -> None:
    splits = load_dataset("digits")
    mean, std = channel_statistics(splits.train)
    assert splits.mean == pytest.approx(mean, abs=1e-4)
    assert splits.std == pytest.approx(std, abs=1e-4)


def test_val_is_the_committed_one() -> None:
    assert load_dataset("digits", val=297).val is not None
    with pytest.raises(UserError, match="val is 100, but digits comes with 297"):
        load_dataset("digits", val=100)
