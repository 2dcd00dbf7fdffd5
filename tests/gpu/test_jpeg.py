"""JPEGs decoded by nvJPEG against the CPU's loader, from damaged files to a busy device."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastokd.data import Augment, DiskSplit, load_dataset, stream_of
from fastokd.data.disk import nvjpeg
from fastokd.data.disk.prepare import prepare
from fastokd.data.photographs import photographs
from fastokd.errors import DataFileError

pytestmark = pytest.mark.gpu
TRAIN = {"seed": 3, "augment": Augment(0, resized_crop=True), "shuffle": True}
# Levels of 255. libjpeg interpolates the colours that JPEG stores at half resolution, and torchvision
# lets nvJPEG repeat them: edges of colours differ. torchvision's own tests allow a mean of 2.
MEAN, FAR, FEW = 2.0, 16, 0.01


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images to train on, of each kind that has its own way through a decoder."""
    root = tmp_path_factory.mktemp("jpegs")
    for split, name in itertools.product(("train", "val"), "ab"):
        (root / split / name).mkdir(parents=True)
        photographs()[0].resize((90, 70)).save(root / split / name / "photo.jpg")
    folder = root / "train" / "a"
    for i, kind in itertools.product(range(2), range(19)):
        photo = photographs()[i].resize((200 + 10 * kind, 320 - 9 * kind))
        ask = {16: {"progressive": True}, 17: {"subsampling": 0}, 18: {"quality": 40}}.get(kind, {})
        modes = {14: "L", 15: "CMYK"}
        photo.convert(modes.get(kind, "RGB")).save(folder / f"{kind}_{i}.jpg", **ask)  # type: ignore[arg-type]
    photographs()[0].resize((300, 200)).save(folder / "0_0.png")
    # Zeros instead of the end marker: libjpeg refuses it, and nvJPEG may.
    endless = folder / "1_0.jpg"
    endless.write_bytes(endless.read_bytes()[:-2] + bytes(3000))
    assert not prepare(root, quiet=True).manifest.quarantined()
    return root


@pytest.fixture
def decoder(device: torch.device) -> torch.device:
    why = nvjpeg.why_not(device)
    if why is not None:
        pytest.skip(f"torchvision can't decode on this device: {why}")
    return device


def split_of(root: Path, loader: str, device: torch.device, size: int = 224) -> DiskSplit:
    splits = load_dataset(
        "imagefolder", root, streamed=True, loader=loader, workers=2, image_size=size, device=device
    )
    split = splits.to(device).train
    assert isinstance(split, DiskSplit)
    return split


def images(split: DiskSplit, batch: int = 16, **options: object) -> Tensor:
    stream = stream_of(split, batch, **options)  # type: ignore[arg-type]
    return torch.cat([images_BHWC for images_BHWC, _ in stream.batches(0)])


@pytest.mark.parametrize("train", [False, True])
def test_pixels_are_nearly_the_cpus(root: Path, decoder: torch.device, train: bool) -> None:
    options = TRAIN if train else {}
    ours, theirs = (
        images(split_of(root, loader, decoder), **options) for loader in ("nvjpeg", "torchvision")
    )
    assert ours.device == theirs.device
    assert ours.shape == (41, 224, 224, 3)
    differ_B = (ours.int() - theirs.int()).abs().flatten(1)
    print(f"most {differ_B.max()}, mean {differ_B.float().mean():.3f} of 255")
    assert differ_B.float().mean(1).max() < MEAN
    assert (differ_B > FAR).float().mean() < FEW
    # Each image is the one that was drawn, and mirrored where it was drawn so.
    mirrored_B = (ours.flip(2).int() - theirs.int()).abs().flatten(1).float().mean(1)
    assert (mirrored_B > 2 * MEAN).all()


def test_a_batch_is_whole_when_it_is_given(root: Path, decoder: torch.device) -> None:
    """Same bits again while the device is busy: memory that is overwritten too early shows."""
    split = split_of(root, "nvjpeg", decoder, 96)
    expected = images(split, 8, **TRAIN).cpu()
    heavy = torch.randn(2048, 2048, device=decoder) if decoder.type == "cuda" else torch.randn(8, 8)
    for _ in range(5 if decoder.type == "cuda" else 1):
        kept = []
        for images_BHWC, _ in stream_of(split, 8, **TRAIN).batches(0):  # type: ignore[arg-type]
            for _ in range(20):
                heavy = (heavy @ heavy).clamp(-1, 1)
            # Read late, and the batch itself is dropped at once.
            kept.append(images_BHWC.clone())
            del images_BHWC
        assert torch.equal(torch.cat(kept).cpu(), expected)


@pytest.mark.parametrize("fault", ["cut", "changed", "gone"])
def test_a_damaged_file_is_named(
    root: Path, tmp_path: Path, decoder: torch.device, fault: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    split = split_of(copy, "nvjpeg", decoder, 64)
    stream = stream_of(split, 8, **TRAIN)  # type: ignore[arg-type]
    victim = split.path(int(stream.draws(0, 3).index_B[1]))
    content = victim.read_bytes()
    victim.unlink()
    if fault != "gone":
        size = len(content) - 2
        victim.write_bytes(content[:-300] if fault == "cut" else content[:2] + b"x" * size)
    seen = []
    with pytest.raises(DataFileError, match=f"{victim.name}.*continue with --resume"):
        seen.extend(stream.batches(0))
    assert len(seen) == 3
    # The decoder goes on after a refused file.
    assert len(stream.batch(0, 1)[0]) == 8


def test_memory_is_given_back(root: Path, decoder: torch.device) -> None:
    """The decoder and its stream are made once, not for each epoch."""
    if decoder.type != "cuda":
        pytest.skip("the CPU's allocator isn't counted")
    split = split_of(root, "nvjpeg", decoder)
    reserved = []
    for _ in range(10):
        images(split, **TRAIN)
        reserved.append(torch.cuda.memory_reserved(decoder))
    assert reserved[-1] < 1.5 * reserved[2]
