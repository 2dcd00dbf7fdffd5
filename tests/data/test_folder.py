"""Folders of images: torchvision's classes and order, and every fault named."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from fastokd.data import DatasetSplits, load_dataset, read_all
from fastokd.data.decode import centre, read_rgb
from fastokd.data.disk.prepare import prepare
from fastokd.data.held_out import listed
from fastokd.data.sets import folder
from fastokd.data.sets.folder import channel_statistics
from fastokd.data.splits import Split
from fastokd.data.views import View
from fastokd.errors import UserError
from tests.data.make import write_folder


def decode_image(path: Path, size: int) -> np.ndarray:
    return centre(read_rgb(path), View(size))


def test_is_torchvisions(tmp_path: Path) -> None:
    """Names that sort otherwise as numbers, nested folders, other files, capitals."""
    root = write_folder(tmp_path, classes=("b10", "b9", "A"), count=12)
    nested = root / "train" / "b9" / "0deep"
    nested.mkdir()
    (root / "train" / "b9" / "3.png").rename(nested / "3.PNG")
    (root / "train" / "b9" / "notes.txt").write_text("no image")
    (root / "train" / "readme.md").write_text("no class")
    splits = load_dataset("imagefolder", root)
    assert splits.class_names == ("A", "b10", "b9")
    for split, name in ((splits.train, "train"), (splits.test, "val")):
        theirs = ImageFolder(root / name)
        assert split.labels_N.tolist() == theirs.targets
        expected = torch.stack([pil_to_tensor(image) for image, _ in theirs])
        assert torch.equal(split.images_NHWC.permute(0, 3, 1, 2), expected)


def test_statistics_are_measured_from_train(tmp_path: Path) -> None:
    splits = load_dataset("imagefolder", write_folder(tmp_path))
    pixels = splits.train.images_NHWC.double().flatten(0, 2) / 255
    assert splits.mean == pytest.approx(pixels.mean(0).tolist(), abs=1e-12)
    assert splits.std == pytest.approx(pixels.std(0, unbiased=False).tolist(), abs=1e-12)


def test_a_channel_without_contrast_stays_finite() -> None:
    split = Split(torch.full((2, 4, 4, 3), 7, dtype=torch.uint8), torch.zeros(2, dtype=torch.long))
    assert channel_statistics(split) == ((7 / 255,) * 3, (1 / 255,) * 3)


def test_val_and_test(tmp_path: Path) -> None:
    """Which folder is which split, said where it isn't plain."""
    only_val = write_folder(tmp_path / "a", splits=("train", "val"))
    splits = load_dataset("imagefolder", only_val, val=2)
    said, test_is_val = splits.note.split("\n")
    assert test_is_val == "No test/ folder: val/ is used as the test set."
    assert said.startswith(
        "images are held out per class by a fixed seed, 6 to train, 2 to validate"
    )
    assert splits.val is not None
    assert (len(splits.train), len(splits.val), len(splits.test)) == (6, 2, 8)
    only_test = write_folder(tmp_path / "b", splits=("train", "test"))
    splits = load_dataset("imagefolder", only_test)
    assert (splits.note, splits.val, len(splits.test)) == ("", None, 8)
    both = write_folder(tmp_path / "c", splits=("train", "val", "test"), seed=1)
    splits = load_dataset("imagefolder", both)
    assert splits.val is not None
    assert (splits.note, len(splits.val)) == ("", 8)
    assert not torch.equal(splits.val.images_NHWC, splits.test.images_NHWC)
    with pytest.raises(UserError, match="val is 2, but imagefolder comes with 8 images"):
        load_dataset("imagefolder", both, val=2)


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (64, 64), (7, 5), (400, 9)])
def test_the_centre_square_is_resized(size: tuple[int, int], tmp_path: Path) -> None:
    """Green in the centre square, red beside it; to 16 pixels."""
    width, height = size
    side = min(size)
    image = Image.new("RGB", size, "red")
    left, top = (width - side) // 2, (height - side) // 2
    image.paste("lime", (left, top, left + side, top + side))
    image.save(tmp_path / "image.png")
    pixels = decode_image(tmp_path / "image.png", 16).astype(int)
    assert pixels.shape == (16, 16, 3)
    assert (abs(pixels[2:-2, 2:-2] - [0, 255, 0]) < 40).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK"])
def test_other_colours_become_rgb(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "white").convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    assert decode_image(path, 8).shape == (8, 8, 3)
    assert decode_image(path, 8).min() == 255


def remove(path: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for file in (root / path).iterdir():
            file.unlink()

    return change


def rename(path: str, other: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / path).rename(root / other)

    return change


def write(path: str, content: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / path).write_bytes(content)

    return change


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


GREY = png(np.zeros((8, 8), np.uint8))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda root: (root / "train").rename(root / "training"), r"no folder .*/train: give"),
        (
            lambda root: (root / "val").rename(root / "valid"),
            "beside train/: rename .*/valid to val$",
        ),
        (rename("val/dog", "val/extra"), "has a class 'extra' that train/ lacks: add its images"),
        (remove("train/cat"), r"has 1 folder with images: it needs at least 2"),
    ],
)
def test_bad_input_is_named(change: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    change(write_folder(tmp_path))
    with pytest.raises(UserError, match=says):
        load_dataset("imagefolder", tmp_path)


def test_one_class_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 1 folder with images: it needs at least 2"):
        load_dataset("imagefolder", write_folder(tmp_path, classes=("cat",)))


@pytest.mark.parametrize("form", ["memory", "streamed"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (write("train/cat/2.png", b""), "1 of 16 files are .*: train/cat/2.png, empty)"),
        (write("val/dog/1.png", b"\xff\xd8\xff no"), "val/dog/1.png, no image)"),
        (write("val/dog/1.png", GREY[:-30]), "1 of 16 files are .*: val/dog/1.png, "),
        (
            write("train/cat/0.png", png(np.zeros((8, 8), np.uint16))),
            "train/cat/0.png, more than 8 bits a channel",
        ),
    ],
)
def test_a_damaged_file_is_left_out_of_every_split(
    form: str, change: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    """One rule in memory and streamed: the others are read, and the file is named."""
    root = write_folder(tmp_path / "set")
    whole = load_dataset("imagefolder", root)
    change(root)
    splits = in_form(form, root)
    assert len(splits.train) + len(splits.test) == 15
    ((path, fault),) = splits.left_out
    assert re.search(says.replace(")", r"\)"), splits.note)
    assert f"{path}, {fault}" in splits.note
    assert listed(splits) == {"left_out": [{"path": path, "fault": fault}]}
    where, kept, all_of_it = (
        ("train", splits.train, whole.train)
        if path.startswith("train")
        else ("val", splits.test, whole.test)
    )
    assert isinstance(all_of_it, Split)
    assert all_of_it.paths_N is not None
    place = all_of_it.paths_N.tolist().index(path.encode())
    assert where in path
    others = [i for i in range(8) if i != place]
    if form == "memory":
        assert torch.equal(read_all(kept)[0], all_of_it.images_NHWC[others])
    assert kept.paths_N is not None
    assert kept.paths_N.tolist() == all_of_it.paths_N[others].tolist()


def in_form(form: str, root: Path, **options: Any) -> DatasetSplits:
    if form == "memory":
        return load_dataset("imagefolder", root, **options)
    prepare(root, quiet=True)
    return load_dataset("imagefolder", root, streamed=True, loader="torchvision", **options)


@pytest.mark.parametrize("form", ["memory", "streamed"])
@pytest.mark.parametrize("folder", ["train", "val"])
def test_many_damaged_files_are_refused(form: str, folder: str, tmp_path: Path) -> None:
    """Up to ten files, or one in twenty, are left out; a run that has begun goes on."""
    root = write_folder(tmp_path / "set", count=30, size=(8, 8))
    images = sorted((root / folder / "cat").iterdir())
    for image in images[:10]:
        image.write_bytes(b"")
    splits = in_form(form, root)
    assert len(splits.left_out) == 10
    assert splits.note.count("empty") == 3
    assert "lists all" in splits.note
    images[10].write_bytes(b"")
    with pytest.raises(UserError, match=rf"11 of 60 files in .*/{folder} can't be used"):
        in_form(form, root)
    assert len(in_form(form, root, begun=True).left_out) == 11
    assert any(
        "can't be used, and a run leaves" in line for line in prepare(root, quiet=True).lines()
    )


@pytest.mark.parametrize("form", ["memory", "streamed"])
@pytest.mark.parametrize("folder", ["train", "val"])
def test_a_class_without_a_usable_image_is_refused(form: str, folder: str, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", size=(8, 8))
    for image in (root / folder / "dog").iterdir():
        image.write_bytes(b"")
    with pytest.raises(UserError, match=rf"none of the images in .*/{folder}/dog can be used"):
        in_form(form, root)


def test_size_is_checked_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder(tmp_path)
    with pytest.raises(UserError, match="image_size is 0"):
        load_dataset("imagefolder", root, image_size=0)
    with pytest.raises(UserError, match=r"takes 447\.0 GiB of memory.*smaller image_size"):
        load_dataset("imagefolder", root, image_size=100_000)
    monkeypatch.setattr(folder, "MAX_BYTES", 16 * 64 * 64 * 3)
    assert load_dataset("imagefolder", root, image_size=64).train.image_size == (64, 64)


JPEG = io.BytesIO()
Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(JPEG, "jpeg")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([GREY, JPEG.getvalue()]),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=5),
    st.integers(0, 10_000),
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damage_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    whole: bytes,
    changes: list[tuple[int, int]],
    length: int,
) -> None:
    content = bytearray(whole)
    for position, value in changes:
        content[position % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.img"
    path.write_bytes(content[: length if length < len(content) else None])
    try:
        pixels = decode_image(path, 8)
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        return
    assert pixels.shape == (8, 8, 3)
