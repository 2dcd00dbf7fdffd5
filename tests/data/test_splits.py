"""What is held out, and the data sets by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastokd.data import list_datasets, load_dataset
from fastokd.data.splits import stratified_split
from fastokd.errors import UserError
from tests.data.make import write_cifar


def unbalanced() -> torch.Tensor:
    """Classes of 70, 25 and 5, shuffled; class 1 of four is missing."""
    labels_N = torch.tensor([0] * 70 + [2] * 25 + [3] * 5)
    return labels_N[torch.randperm(100)]


@pytest.mark.parametrize("count", [1, 7, 20, 99])
def test_held_out_is_stratified(count: int) -> None:
    labels_N = unbalanced()
    kept, held = stratified_split(labels_N, count, seed=0)
    assert len(held) == count
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(100))
    assert torch.equal(kept, kept.sort().values)
    shares_C = torch.bincount(labels_N).double() * count / 100
    held_C = torch.bincount(labels_N[held], minlength=4).double()
    assert (held_C - shares_C).abs().max() < 1


def test_held_out_depends_on_the_seed_alone() -> None:
    labels_N = unbalanced()
    again = [stratified_split(labels_N, 30, seed=seed)[1].tolist() for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


@pytest.mark.parametrize("val", [-1, 20, 21])
def test_val_must_fit(tmp_path: Path, val: int) -> None:
    write_cifar(tmp_path, "cifar10", train=20, test=10)
    with pytest.raises(UserError, match=f"val is {val}: it must be between 1 and 19"):
        load_dataset("cifar10", tmp_path, val=val)


def test_val_leaves_train(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10", train=50, test=10)
    whole, parted = load_dataset("cifar10", tmp_path), load_dataset("cifar10", tmp_path, val=10)
    assert whole.val is None
    assert parted.val is not None
    assert torch.bincount(parted.val.labels_N).tolist() == [1] * 10
    assert torch.equal(parted.test.images_NHWC, whole.test.images_NHWC)

    def as_set(images_NHWC: torch.Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in images_NHWC}

    kept, held = as_set(parted.train.images_NHWC), as_set(parted.val.images_NHWC)
    assert not kept & held
    assert kept | held == as_set(whole.train.images_NHWC)


def test_to_moves_every_split(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10", train=20, test=10)
    moved = load_dataset("cifar10", tmp_path, val=5).to("meta")
    assert moved.val is not None
    for split in (moved.train, moved.val, moved.test):
        assert split.images_NHWC.device.type == split.labels_N.device.type == "meta"


def test_names() -> None:
    small = ["cifar10", "cifar100", "digits", "fashion_mnist", "stl10", "svhn", "tiny_imagenet"]
    assert list_datasets() == sorted([*small, "glyphs", "hf", "imagefolder", "imagenet", "wds"])
    with pytest.raises(UserError, match="unknown dataset 'cifar-10': did you mean cifar10"):
        load_dataset("cifar-10")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagefolder"])
def test_missing_root_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name} needs to know where its files are"):
        load_dataset(name)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=f"{file} is a file: give the folder"):
        load_dataset(name, file)


def test_a_root_may_begin_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path / "sets", "cifar10")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_dataset("cifar10", Path("~/sets")).train) == 100


def test_image_size_is_for_folders() -> None:
    with pytest.raises(UserError, match="image_size is 64, but digits is shown at 32"):
        load_dataset("digits", image_size=64)
