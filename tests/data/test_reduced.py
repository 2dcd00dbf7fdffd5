"""Fewer training images and wrong labels: how many, of which classes, and the same by seed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fastokd.data import DatasetSplits, Split
from fastokd.data.held_out import listed
from fastokd.data.preprocessing import preprocessing_of
from fastokd.data.reduced import chosen, noisy, reduced
from fastokd.errors import UserError
from fastokd.recipe.names import recipe
from fastokd.run.images import load_splits
from fastokd.run.options import RunOptions

LABELS_N = torch.arange(200) % 4


@pytest.mark.parametrize(("fraction", "each"), [(0.5, 25), (0.1, 5), (0.001, 1)])
def test_each_class_has_its_share(fraction: float, each: int) -> None:
    kept = chosen(LABELS_N, fraction, 0)
    assert LABELS_N[kept].bincount().tolist() == [each] * 4
    assert kept.equal(kept.unique())
    assert kept.equal(chosen(LABELS_N, fraction, 0))
    assert not kept.equal(chosen(LABELS_N, fraction, 1))


def test_a_smaller_share_is_within_a_larger() -> None:
    few, more = (set(chosen(LABELS_N, share, 3).tolist()) for share in (0.1, 0.4))
    assert few < more
    little, much = (noisy(LABELS_N, 4, share, 3) for share in (0.2, 0.4))
    wrong_N = little != LABELS_N
    assert wrong_N.sum() == 40
    assert (much != LABELS_N).sum() == 80
    assert little[wrong_N].equal(much[wrong_N])


def test_wrong_labels_are_uniform_over_the_other_classes() -> None:
    labels_N = torch.zeros(30_000, dtype=torch.int64)
    counts = noisy(labels_N, 4, 0.5, 0).bincount()
    assert counts[0] == 15_000
    assert (counts[1:] - 5000).abs().max() < 250  # 3.5 deviations


def test_the_held_out_images_stay_as_they_are() -> None:
    options = RunOptions()
    whole = load_splits(recipe("baseline/resnet8/digits"), options)
    changed = load_splits(
        recipe("baseline/resnet8/digits", fraction=0.5, label_noise=0.4, seed=1), options
    )
    assert abs(len(changed.train) - len(whole.train) / 2) <= 5  # half of each class, rounded
    for name in ("val", "test"):
        ours, theirs = getattr(changed, name), getattr(whole, name)
        assert ours.labels_N.equal(theirs.labels_N)
        assert ours.images_NHWC.equal(theirs.images_NHWC)
    assert "training labels are wrong (noise 0.4)" in changed.note


def test_a_resumed_run_draws_from_all_its_files() -> None:
    """data.json lists them all, from which the resumed run draws the same ones."""
    paths = np.array([os.fsencode(f"{index}.png") for index in range(8)])
    images = torch.zeros(8, 4, 4, 3, dtype=torch.uint8)
    split = Split(images, torch.arange(8) % 2, paths)
    shown = preprocessing_of("imagefolder", mean=(0.5,) * 3, std=(0.5,) * 3, image_size=4)
    splits = DatasetSplits(
        "imagefolder", ("a", "b"), shown, split, split, split, held_out={"val": 4}
    )
    few = reduced(splits, fraction=0.5, label_noise=0.0, seed=0)
    assert len(few.train) == 4
    assert listed(few)["train"] == [str(Path(os.fsdecode(path))) for path in paths]


@pytest.mark.parametrize(
    ("name", "value"),
    [("fraction", 0.0), ("fraction", 1.5), ("label_noise", 1.0), ("label_noise", -0.1)],
)
def test_bad_shares(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}: it must be"):
        recipe("baseline/resnet8/digits", **{name: value})
