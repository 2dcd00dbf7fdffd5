"""Training images of another size than evaluation's, and of a size that grows with the epochs."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastokd
from fastokd.data import Augment, load_dataset, stream_of
from fastokd.data.disk.prepare import prepare
from fastokd.errors import UserError
from fastokd.recipe.names import recipe
from fastokd.recipe.resolution import training_size
from tests.data.loaders import LOADERS
from tests.data.make import write_folder

NAME = "baseline/resnet18/imagenet"


@pytest.mark.parametrize(("epochs", "begin", "end"), [(16, 11, 13), (88, 65, 76), (24, 17, 20)])
def test_sizes_are_those_of_ffcv(epochs: int, begin: int, end: int) -> None:
    grown = recipe(NAME, epochs=epochs, train_size=192, first_size=160, size_epochs=[begin, end])
    for epoch in range(epochs):
        line = np.interp(epoch, [begin, end], [160, 192])
        expected = int(np.round(line / 32)) * 32 if begin < epoch < end else int(line)
        assert training_size(grown, epoch) == expected
    assert {training_size(grown, epoch) for epoch in range(epochs)} == {160, 192}


def test_one_size_and_none() -> None:
    assert training_size(recipe(NAME), 5) == 224
    assert training_size(recipe(NAME, train_size=176), 5) == 176
    shorter = recipe(NAME, train_size=192, first_size=128, size_epochs=[30, 60]).with_epochs(45)
    assert shorter.size_epochs == (15, 30)


@pytest.mark.parametrize("epochs", [2, 3, 4, 5, 8])
def test_a_short_run_reaches_the_full_size(epochs: int) -> None:
    short = recipe(f"{NAME}@ffcv16", epochs=epochs)
    assert [training_size(short, epoch) for epoch in (0, epochs - 1)] == [160, 192]


@pytest.mark.parametrize("loader", LOADERS)
def test_a_stream_gives_the_size_of_its_epoch(tmp_path: Path, loader: str) -> None:
    root = write_folder(tmp_path / "set", size=(80, 70))
    prepare(root, quiet=True)
    splits = load_dataset("imagefolder", root, image_size=40, streamed=True, loader=loader)
    augment = Augment(crop_padding=0, resized_crop=True)
    sizes = [32, 64, 40]
    stream = stream_of(
        splits.train, 4, augment=augment, shuffle=True, size=lambda epoch: sizes[epoch]
    )
    plain = stream_of(splits.train, 4, augment=augment, shuffle=True)
    for epoch, size in enumerate(sizes):
        images_BHWC, labels_B = next(iter(stream.batches(epoch)))
        assert images_BHWC.shape == (4, size, size, 3)
        expected_BHWC, expected_B = next(iter(plain.batches(epoch)))
        assert torch.equal(labels_B, expected_B)
        assert torch.equal(images_BHWC, expected_BHWC) == (size == 40)
    held_out = next(iter(stream_of(splits.test, 4).batches(0)))[0]
    assert held_out.shape[1:] == (40, 40, 3)


def test_a_run_that_grows_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an average's statistics are computed on images of the epoch's size."""
    seen: list[set[int]] = []

    def recompute(cohort: object, batches: Iterable[torch.Tensor], *_: object) -> None:
        seen.append({images_BHWC.shape[1] for images_BHWC in batches})

    monkeypatch.setattr(import_module("fastokd.evaluate"), "recompute", recompute)
    root = write_folder(tmp_path / "set", size=(80, 70))
    prepare(root, quiet=True)
    growing = recipe(
        "dml/resnet8/imagefolder",
        **{"epochs": 3, "batch_size": 4, "students": 2, "resized_crop": True, "crop_padding": 0},
        **{"image_size": 64, "first_size": 32, "size_epochs": [0, 2]},
        **{"ema": 0.5, "average_norms": "recomputed"},
    )
    assert [training_size(growing, epoch) for epoch in range(3)] == [32, 64, 64]
    how = {"data_root": root, "quiet": True, "engine": "loop", "loader": "torchvision"}
    whole = fastokd.train(growing, out=tmp_path / "whole", **how)
    assert seen == [{32}, {64}, {64}]
    steps = len(whole.metrics)
    fastokd.train(growing, out=tmp_path / "cut", max_steps=steps, **how)
    cut = fastokd.train(growing, out=tmp_path / "cut", resume=True, **how)
    assert len(cut.metrics) == 3
    ours, theirs = (load_file(run.folder / "student.safetensors") for run in (cut, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("baseline/resnet8/cifar10", {"train_size": 24}, "images in memory have one size"),
        (NAME, {"size_epochs": [1, 2]}, "no size grows"),
        (NAME, {"first_size": 16, "size_epochs": [1, 2]}, "first_size is 16"),
        (NAME, {"first_size": 256, "size_epochs": [1, 2]}, "first_size is 256"),
        (NAME, {"first_size": 160}, "must be two of the 90 epochs"),
        (NAME, {"first_size": 160, "size_epochs": [5, 2]}, "must be two of the 90 epochs"),
        (NAME, {"first_size": 160, "size_epochs": [5, 91]}, "must be two of the 90 epochs"),
    ],
)
def test_sizes_that_contradict_each_other(name: str, changes: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe(name, **changes)
