"""The nvJPEG loader's own cases, with libjpeg on the CPU; ``test_disk.py`` has those of all loaders."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastokd.data import Augment, DiskSplit, load_dataset, stream_of
from fastokd.data.disk import dali, nvjpeg
from fastokd.data.disk.prepare import prepare
from fastokd.data.disk.prepared import pick_loader
from fastokd.data.disk.split import DiskDraws
from fastokd.data.photographs import photographs
from fastokd.distributed.ranks import Ranks
from fastokd.errors import DataFileError, LoaderError, UserError
from fastokd.recipe.names import recipe
from fastokd.run.build import build
from fastokd.run.options import RunOptions
from tests.data.loaders import NVJPEG

GPU = torch.device("cuda")
TRAIN = {"seed": 7, "augment": Augment(0, resized_crop=True), "shuffle": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images to train on: large and small, long, grey, progressive, PNG, and one without an end."""
    root = tmp_path_factory.mktemp("jpegs")
    photo = photographs()[0]
    for split, name in itertools.product(("train", "val"), "ab"):
        (root / split / name).mkdir(parents=True)
        photo.resize((90, 70)).save(root / split / name / "photo.jpg")
    folder = root / "train" / "a"
    for i in range(14):
        photo.resize((40 + 37 * i, 400 - 23 * i)).save(folder / f"{i}.jpg", quality=80 + i)
    photo.resize((640, 20)).save(folder / "long.jpg")
    photo.resize((20, 640)).save(folder / "tall.jpg")
    photo.resize((1, 1)).save(folder / "dot.jpg")
    photo.convert("L").resize((200, 100)).save(folder / "grey.jpg")
    photo.resize((200, 100)).save(folder / "progressive.jpg", progressive=True)
    photo.resize((200, 100)).save(folder / "full.jpg", subsampling=0)
    photo.resize((200, 100)).save(folder / "still.png")
    # Zeros instead of the end marker: Pillow decodes it, and torchvision refuses it.
    endless = folder / "endless.jpg"
    photo.resize((200, 100)).save(endless)
    endless.write_bytes(endless.read_bytes()[:-2] + bytes(3000))
    assert not prepare(root, quiet=True).manifest.quarantined()
    return root


def split_of(root: Path, loader: str, size: int = 32, resize: int = 0) -> DiskSplit:
    ask = {"streamed": True, "image_size": size, "eval_resize": resize}
    split = load_dataset("imagefolder", root, loader=loader, workers=2, **ask).train  # type: ignore[arg-type]
    assert isinstance(split, DiskSplit)
    return split


def images(split: DiskSplit, **options: object) -> Tensor:
    stream = stream_of(split, 8, **options)  # type: ignore[arg-type]
    return torch.cat([images_BHWC for images_BHWC, _ in stream.batches(0)])


def by_device(split: DiskSplit, index: int, box: list[int] | None) -> bool:
    """Whether an image's bytes are read for the device; else its pixels are made."""
    box_14 = None if box is None else torch.tensor([box])
    draws = DiskDraws(torch.tensor([index]), box_14, torch.zeros(1, dtype=torch.int64))
    (image,) = nvjpeg._images(split, [draws])
    return nvjpeg._read(split, image).dim() == 1


@pytest.mark.parametrize(("size", "resize"), [(32, 0), (32, 37), (224, 256)])
@pytest.mark.parametrize("train", [False, True])
def test_crops_and_flips_are_the_cpu_loaders(
    root: Path, size: int, resize: int, train: bool
) -> None:
    """Of equally decoded images, within a level: float32 rounds once, Pillow after each direction."""
    options = TRAIN if train else {}
    ours, theirs = (
        images(split_of(root, loader, size, resize), **options).int()
        for loader in ("nvjpeg", "torchvision")
    )
    assert len(ours) == 24
    differ = (ours - theirs).abs()
    assert differ.max() <= NVJPEG
    assert 0 < differ.float().mean() < 0.25


def test_files_are_decoded_in_parts_of_limited_size(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = split_of(root, "nvjpeg")
    whole = images(split, **TRAIN)
    monkeypatch.setattr(nvjpeg, "PIXELS", 80_000)
    drawn = stream_of(split, 24, **TRAIN).draws(0, 0)  # type: ignore[arg-type]
    rows = list(range(24))
    parts = list(nvjpeg._parts(nvjpeg._images(split, [drawn]), rows))
    pixels = [split.sizes_N2[drawn.index_B[part]].prod(1) for part in parts]
    assert [row for part in parts for row in part] == rows
    assert len(parts) > 4
    assert max(int(each.sum()) for each in pixels) <= 80_000
    assert torch.equal(images(split, **TRAIN), whole)


def test_pillow_decodes_what_the_decoder_refuses(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a file is given to the decoder in the first epoch only."""
    nvjpeg._refused.cache_clear()
    calls = []
    decoded = nvjpeg._decoded
    monkeypatch.setattr(nvjpeg, "_decoded", lambda *a: calls.append(len(a[0])) or decoded(*a))
    split, theirs = split_of(root, "nvjpeg"), split_of(root, "torchvision")
    assert split.plain_N.all()
    row = next(i for i in range(24) if split.path(i).name == "endless.jpg")
    counts = []
    for _ in range(2):
        assert torch.equal(images(split)[row], images(theirs)[row])
        counts.append(len(calls))
        calls.clear()
    assert counts[0] > counts[1] == 3
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "nvJPEG doesn't decode" in told[0]
    assert "endless.jpg" in told[0]


@pytest.mark.parametrize("place", ["_decoded", "_resized"])
def test_a_gpu_without_memory_refuses_no_file(
    root: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    nvjpeg._refused.cache_clear()

    def short(*_: object) -> None:
        raise RuntimeError("Error while decoding JPEG images: CUDA out of memory")

    split = split_of(root, "nvjpeg")
    monkeypatch.setattr(nvjpeg, place, short)
    with pytest.raises(LoaderError, match="the GPU ran out of memory while images were decoded"):
        images(split)
    assert not nvjpeg._refused(split.root)


def test_two_streams_decode_one_after_the_other(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share a CUDA stream and its memory."""
    inside, most = 0, 0
    resized = nvjpeg._resized

    def watched(*args: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)
        found = resized(*args)
        inside -= 1
        return found

    monkeypatch.setattr(nvjpeg, "_resized", watched)
    split = split_of(root, "nvjpeg")
    both = [stream_of(split, 4, **TRAIN).batches(0) for _ in range(2)]  # type: ignore[arg-type]
    assert len(list(zip(*both, strict=True))) == 6
    assert most == 1


def test_threads_that_cannot_start_are_an_error_with_advice(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    split = split_of(root, "nvjpeg")
    monkeypatch.setattr(nvjpeg.ThreadPoolExecutor, "submit", none_left)
    with pytest.raises(LoaderError, match="can't start new thread: raise the limit"):
        images(split)


def test_a_folder_of_other_files_has_worker_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, name in itertools.product(("train", "val"), "ab"):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / split / name / "x.png")
    prepare(tmp_path, quiet=True)
    monkeypatch.setattr(dali, "why_not", lambda: "no module nvidia")
    monkeypatch.setattr(nvjpeg, "why_not", lambda device: None)
    ask: dict[str, Any] = {"streamed": True, "image_size": 32}
    found = load_dataset("imagefolder", tmp_path, device="cuda", **ask)
    assert found.loader == "torchvision"
    assert "nor nvJPEG (most files aren't JPEGs)" in found.note
    found = load_dataset("imagefolder", tmp_path, loader="nvjpeg", **ask)
    assert found.note.startswith("images are decoded by nvjpeg (by libjpeg, since")
    assert "4 files that are no plain JPEGs are decoded by Pillow" in found.note


@pytest.mark.parametrize(("name", "of_device"), [("long", False), ("grey", True), ("7", True)])
def test_what_the_device_resizes(root: Path, name: str, of_device: bool) -> None:
    """A long image isn't resized whole; a crop of it is."""
    split = split_of(root, "nvjpeg")
    row = next(i for i in range(24) if split.path(i).name == f"{name}.jpg")
    assert by_device(split, row, None) == of_device
    assert by_device(split, row, [0, 0, 9, 9])


def test_images_that_are_large_or_shrink_much_are_pillows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, name in itertools.product(("train", "val"), "ab"):
        (tmp_path / split / name).mkdir(parents=True)
        Image.fromarray(np.full((500, 520, 3), 80, np.uint8)).save(
            tmp_path / split / name / "x.jpg"
        )
    prepare(tmp_path, quiet=True)
    assert by_device(split_of(tmp_path, "nvjpeg", 9), 0, None)
    assert not by_device(split_of(tmp_path, "nvjpeg", 8), 0, None)
    monkeypatch.setattr(nvjpeg, "PIXELS", 500 * 520 - 1)
    assert not by_device(split_of(tmp_path, "nvjpeg", 9), 0, None)


def test_a_file_damaged_in_place_is_named(root: Path, tmp_path: Path) -> None:
    """It has its size and begins as a JPEG: the decoder refuses it, and so does Pillow."""
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    split = split_of(copy, "nvjpeg")
    stream = stream_of(split, 4, **TRAIN)  # type: ignore[arg-type]
    victim = split.path(int(stream.draws(0, 3).index_B[1]))
    victim.write_bytes(b"\xff\xd8" + b"x" * (victim.stat().st_size - 2))
    seen = []
    with pytest.raises(DataFileError, match=f"{victim.name}.*continue with --resume"):
        seen.extend(stream.batches(0))
    assert len(seen) == 3


def test_no_thread_is_left(root: Path) -> None:
    before = threading.active_count()
    batches = stream_of(split_of(root, "nvjpeg"), 4, **TRAIN).batches(0)  # type: ignore[arg-type]
    next(batches)
    assert threading.active_count() > before
    batches.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(10)
    assert threading.active_count() == before


def test_the_decoder_of_a_gpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI first, then nvJPEG, then worker processes; the run says why."""
    assert nvjpeg.why_not(torch.device("cpu")) is None
    monkeypatch.setattr(dali, "why_not", lambda: "no module nvidia")
    assert pick_loader("auto") == ("torchvision", "")
    monkeypatch.setattr(nvjpeg, "why_not", lambda device: None)
    assert pick_loader("auto", GPU) == ("nvjpeg", "DALI isn't available (no module nvidia)")
    splits = load_dataset("imagefolder", root, streamed=True, device="cuda")
    assert splits.loader == "nvjpeg"
    assert splits.note.startswith(
        "images are decoded by nvjpeg, as DALI isn't available (no module"
    )
    monkeypatch.setattr(nvjpeg, "why_not", lambda device: "no nvJPEG in this build")
    loader, why = pick_loader("auto", GPU)
    assert loader == "torchvision"
    assert (
        why == "neither DALI (no module nvidia) nor nvJPEG (no nvJPEG in this build) is available"
    )
    with pytest.raises(UserError, match="'nvjpeg', which isn't available: no nvJPEG in this build"):
        pick_loader("nvjpeg", GPU)
    monkeypatch.setattr(dali, "why_not", lambda: None)
    assert pick_loader("auto", GPU) == ("dali", "")


def test_ranks_have_one_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "gather", lambda self, value: ["nvjpeg", "torchvision", "nvjpeg"])
    with pytest.raises(UserError, match="ranks decode with nvjpeg and torchvision: choose one"):
        build(recipe("ind/resnet8/digits"), RunOptions(quiet=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_says_why() -> None:
    assert nvjpeg.why_not(GPU)
