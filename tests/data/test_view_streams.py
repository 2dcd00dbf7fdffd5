"""A view per student: each view has draws of its own, which depend on nothing but its number."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastokd.data import Augment, Split, load_dataset, stream_of
from fastokd.data.augment.kinds import with_kinds
from fastokd.data.augment.rows import Uniform, draw_stages
from fastokd.data.disk import image as image_module
from fastokd.data.disk import nvjpeg, workers
from fastokd.data.disk.prepare import prepare
from fastokd.data.disk.split import DiskSplit
from fastokd.data.disk.stream import DiskStream
from fastokd.data.photographs import photographs
from tests.data.loaders import LOADERS, alike

VIEWS = (0, 1, 2)
CROPPED = Augment(crop_padding=2, flip=True)


def in_memory(N: int = 23) -> Split:
    return Split(torch.randint(256, (N, 8, 6, 3), dtype=torch.uint8), torch.arange(N))


def plain(split: Split, draws: Any) -> Tensor:
    """Pad, crop and flip of one image after another."""
    images = []
    for index, top, left, flip in zip(*(d.tolist() for d in draws), strict=True):
        padded = np.pad(split.images_NHWC[index].numpy(), ((2, 2), (2, 2), (0, 0)))
        crop = padded[top : top + 8, left : left + 6]
        images.append(torch.from_numpy((crop[:, ::-1] if flip else crop).copy()))
    return torch.stack(images)


def test_each_view_is_its_own_draw_of_the_same_images() -> None:
    split = in_memory()
    stream = stream_of(split, 7, seed=3, augment=CROPPED, shuffle=True, views=VIEWS)
    for index in range(len(stream)):
        images_VBHWC, labels_B = stream.batch(2, index)
        draws = [stream.draws(2, index, view) for view in VIEWS]
        assert all(torch.equal(labels_B, one.index_B) for one in draws)
        for view in VIEWS:
            assert torch.equal(images_VBHWC[view], plain(split, draws[view]))
    assert not torch.equal(images_VBHWC[0], images_VBHWC[1])
    assert not torch.equal(images_VBHWC[1], images_VBHWC[2])


def test_a_view_depends_on_its_number_alone() -> None:
    """So students may be spread over ranks, and view 0 is the shared batch."""
    split = in_memory()

    def batch(**options: Any) -> Tensor:
        return stream_of(split, 8, augment=CROPPED, shuffle=True, **options).batch(1, 1)[0]

    every = batch(views=VIEWS)
    assert torch.equal(every[0], batch())
    assert torch.equal(every[1:], batch(views=(1, 2)))
    shares = [batch(views=VIEWS, rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(every, torch.cat(shares, dim=1))


def test_the_operations_of_each_view_are_its_own_draw() -> None:
    """As streams of one view each; view 0 as without views."""
    augment = replace(CROPPED, auto_augment="trivialaugment", random_erasing=0.5)
    split = in_memory()

    def batch(**options: Any) -> Tensor:
        return stream_of(split, 8, augment=augment, shuffle=True, **options).batch(1, 1)[0]

    every = batch(views=VIEWS)
    assert torch.equal(every[0], batch())
    for view in VIEWS:
        assert torch.equal(every[view], batch(views=(view,))[0])
    plain = stream_of(split, 8, augment=CROPPED, shuffle=True, views=VIEWS).batch(1, 1)[0]
    changed_VB = (every != plain).flatten(2).any(2)
    assert not torch.equal(changed_VB[0], changed_VB[1])
    shares = [batch(views=VIEWS, rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(every, torch.cat(shares, dim=1))


def test_views_without_augmentation_are_equal() -> None:
    images_VBHWC, labels_B = stream_of(in_memory(), 5, views=(0, 1)).batch(0, 0)
    assert images_VBHWC.shape == (2, 5, 8, 6, 3)
    assert labels_B.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(images_VBHWC[0], images_VBHWC[1])


SIZE = 32
TRAIN: dict[str, Any] = {"seed": 7, "augment": Augment(0, resized_crop=True), "shuffle": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of several sizes, one of them with transparency, which Pillow alone decodes."""
    root = tmp_path_factory.mktemp("pictures")
    photo = photographs()[0]
    for split, name in itertools.product(("train", "val"), "ab"):
        (root / split / name).mkdir(parents=True)
        for i in range(5 if split == "train" else 1):
            photo.resize((90 + 40 * i, 160 - 11 * i)).save(root / split / name / f"{i}.jpg")
    photo.resize((120, 90)).convert("RGBA").save(root / "train" / "a" / "clear.png")
    assert not prepare(root, quiet=True).manifest.quarantined()
    return root


def on_disk(root: Path, loader: str) -> DiskSplit:
    data = load_dataset(
        "imagefolder", root, loader=loader, workers=2, streamed=True, image_size=SIZE
    )
    assert isinstance(data.train, DiskSplit)
    return data.train


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_crops_each_view(root: Path, loader: str) -> None:
    """As streams of one view each, over two batches and an epoch begun in the middle."""
    split = on_disk(root, loader)
    found = list(stream_of(split, 4, views=VIEWS, **TRAIN).batches(0))
    assert [labels_B.shape[0] for _, labels_B in found] == [4, 4, 3]
    for view in VIEWS:
        alone = list(stream_of(split, 4, views=(view,), **TRAIN).batches(0))
        for (ours, labels_B), (theirs, same_B) in zip(found, alone, strict=True):
            assert torch.equal(labels_B, same_B)
            assert theirs.shape == (1, len(labels_B), SIZE, SIZE, 3)
            for ours_HWC, theirs_HWC in zip(ours[view], theirs[0], strict=True):
                if loader == "dali":
                    assert alike(loader, ours_HWC.numpy(), theirs_HWC.numpy())
                else:
                    assert torch.equal(ours_HWC, theirs_HWC)
    assert not torch.equal(found[0][0][0], found[0][0][1])
    again = stream_of(split, 4, views=VIEWS, **TRAIN).batch(0, 1)
    assert torch.equal(again[0], found[1][0])


def test_operations_on_files_are_each_views_own(root: Path) -> None:
    split = on_disk(root, "torchvision")
    options = {**TRAIN, "augment": replace(TRAIN["augment"], auto_augment="trivialaugment")}
    every = stream_of(split, 11, views=VIEWS, **options).batch(0, 0)[0]
    for view in VIEWS:
        assert torch.equal(
            every[view], stream_of(split, 11, views=(view,), **options).batch(0, 0)[0][0]
        )
    assert not torch.equal(every, stream_of(split, 11, views=VIEWS, **TRAIN).batch(0, 0)[0])


@pytest.mark.parametrize("loader", LOADERS)
def test_view_0_is_the_batch_without_views(root: Path, loader: str) -> None:
    split = on_disk(root, loader)
    shared, _ = stream_of(split, 11, **TRAIN).batch(1, 0)
    (images_BHWC,), _ = stream_of(split, 11, views=(0,), **TRAIN).batch(1, 0)
    assert torch.equal(shared, images_BHWC)


def test_a_file_is_decoded_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    read_rgb = image_module.read_rgb
    monkeypatch.setattr(image_module, "read_rgb", lambda *a: read.append(a[0]) or read_rgb(*a))  # type: ignore[func-returns-value]
    split = on_disk(root, "torchvision")
    stream = DiskStream(split, stream_of(split, 11, **TRAIN).order, TRAIN["augment"], views=VIEWS)
    draws = stream._by_view(0, 0)
    chunks = list(workers._chunks(draws, 5))
    made = [workers.make(split, chunk, torch.zeros(1)) for chunk in chunks]
    assert [one.shape[:2] for one in made if isinstance(one, Tensor)] == [(5, 3), (5, 3), (1, 3)]
    assert len(read) == 11

    split = on_disk(root, "nvjpeg")
    decoded = nvjpeg._decoded
    files: list[int] = []
    monkeypatch.setattr(nvjpeg, "_decoded", lambda *a: files.append(len(a[0])) or decoded(*a))  # type: ignore[func-returns-value]
    read.clear()
    stream_of(split, 11, views=VIEWS, **TRAIN).batch(0, 0)
    assert (sum(files), len(read)) == (10, 1)


def test_each_view_has_its_kind() -> None:
    """View v is that of a stream whose views all have its augmentation; ``none`` is the images."""
    split, base = in_memory(), Augment(crop_padding=2, flip=True)
    kinds = ("rotation", "cutout", "randaugment", "autoaugment", "plain", "none")
    augment, views = with_kinds(base, kinds, 8), range(len(kinds))
    assert [(one.flip, one.cutout, one.rotation) for one in augment.views[:3]] == [
        (True, 0, 15.0),
        (True, 4, 0.0),
        (False, 0, 0.0),
    ]

    def batch(augment: Augment) -> Tensor:
        return stream_of(split, 7, seed=3, augment=augment, shuffle=True, views=views).batch(2, 1)[
            0
        ]

    images_VBHWC, seen = batch(augment), stream_of(split, 7, seed=3, shuffle=True).batch(2, 1)[0]
    for view in views[:-1]:
        assert torch.equal(images_VBHWC[view], batch(augment.views[view])[view]), kinds[view]
    assert torch.equal(images_VBHWC[-1], seen)
    angle_B = draw_stages(augment.views[0], 1000, (8, 6), Uniform(torch.Generator()))[0][1]
    assert 14.5 < abs(angle_B).max() <= 15
    assert abs(angle_B.mean()) < 1
