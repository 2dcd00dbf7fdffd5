"""Sets on disk: all loaders give the same batches, in the same order, from any batch on."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fastokd.data import Augment, DiskSplit, load_dataset, read_all, stream_of
from fastokd.data.disk.prepare import prepare
from fastokd.data.disk.prepared import load_prepared
from fastokd.data.photographs import write_photographs
from fastokd.data.preprocessing import preprocessing_of
from fastokd.data.views import View
from fastokd.errors import DataFileError, UserError
from tests.data.loaders import LOADERS, needs_dali

SMALL = View(32, 37)
TRAIN = {"seed": 3, "augment": Augment(0, resized_crop=True), "shuffle": True}
# Two libraries resample, one of them rounding twice: levels of 0 to 255 differ by 2 at most, and by
# more only at the rim of a random crop, beyond which one has decoded the colours and the other not.
EVAL_LEVELS, EVAL_MEAN_LEVELS = 2, 0.25
TRAIN_MEAN_LEVELS, TRAIN_FAR = 0.3, 0.01


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 33 images to train, 15 to be tested on."""
    root = tmp_path_factory.mktemp("photographs")
    write_photographs(root, classes=3, train=11, val=5, size=(150, 112))
    # One of each kind that has its own way through a decoder.
    folder = root / "train" / "n00000001"
    files = sorted(folder.iterdir())
    for file, mode in zip(files[:2], ("L", "CMYK"), strict=True):
        Image.open(file).convert(mode).save(file, quality=90)
    Image.open(files[2]).save(files[2], "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees", which torchvision doesn't
    Image.open(files[3]).save(files[3], exif=exif, quality=90)
    prepare(root, quiet=True)
    return root


def split_of(root: Path, loader: str, name: str = "train", view: View = SMALL) -> DiskSplit:
    shown = preprocessing_of("imagenet", image_size=view.image_size, eval_resize=view.eval_resize)
    splits = load_prepared("imagenet", root, shown, loader=loader, workers=2)
    split = splits.train if name == "train" else splits.test
    assert isinstance(split, DiskSplit)
    return split


def assert_same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> None:
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left[0], right[0])
        assert torch.equal(left[1], right[1])


@pytest.mark.parametrize("loader", LOADERS)
def test_resumed_in_an_epoch_the_batches_are_the_same(root: Path, loader: str) -> None:
    split = split_of(root, loader)
    stream = stream_of(split, 8, **TRAIN)
    whole = list(stream.batches(2))
    assert [len(labels_B) for _, labels_B in whole] == [8, 8, 8, 8, 1]
    assert whole[0][0].dtype == torch.uint8
    assert whole[0][0].shape == (8, 32, 32, 3)
    assert whole[0][1].dtype == torch.int64
    # Left in the middle of an epoch, then begun anew by another object.
    assert_same(list(itertools.islice(stream.batches(2), 2)), whole[:2])
    assert_same(list(stream_of(split, 8, **TRAIN).batches(2, start_batch=2)), whole[2:])
    assert_same([stream.batch(2, 3)], whole[3:4])
    for epoch, seed in ((3, 3), (2, 4)):
        other = next(stream_of(split, 8, **{**TRAIN, "seed": seed}).batches(epoch))
        assert not torch.equal(other[0], whole[0][0])


@pytest.mark.parametrize("loader", LOADERS)
def test_what_was_given_is_never_overwritten(root: Path, loader: str) -> None:
    kept = [
        (images, images.clone()) for images, _ in stream_of(split_of(root, loader), 4).batches(0)
    ]
    assert len(kept) == 9
    assert all(torch.equal(images, copy) for images, copy in kept)


@pytest.mark.parametrize("loader", LOADERS)
def test_the_global_generator_is_left_alone(root: Path, loader: str) -> None:
    """Else a run that is resumed within an epoch would draw other dropout masks."""
    state = torch.get_rng_state()
    list(stream_of(split_of(root, loader), 8, **TRAIN).batches(0))
    assert torch.equal(torch.get_rng_state(), state)


@needs_dali
def test_both_loaders_train_on_nearly_the_same_pixels(root: Path) -> None:
    """Grey, CMYK, PNG and turned images among them."""
    loaders = ("dali", "torchvision")
    batches = [stream_of(split_of(root, loader), 11, **TRAIN).batches(1) for loader in loaders]
    for (a, labels_a), (b, labels_b) in zip(*batches, strict=True):
        assert torch.equal(labels_a, labels_b)
        differ = (a.int() - b.int()).abs()
        assert differ.float().flatten(1).mean(1).max() < TRAIN_MEAN_LEVELS
        assert (differ > 2).float().mean() < TRAIN_FAR
        # Which would be far more, were one image seen elsewhere or not mirrored.
        assert (a.int() - b.flip(2).int()).abs().float().mean() > 5


@pytest.mark.parametrize("view", [View(32, 37), View(96, 110), View(100, 0)])
@pytest.mark.parametrize("loader", LOADERS)
def test_held_out_images_are_torchvisions(root: Path, loader: str, view: View) -> None:
    """Against torchvision's own folder, resize and centre crop of PIL images, in its order."""
    see = v2.Compose([v2.Resize(view.resize), v2.CenterCrop(view.image_size), v2.PILToTensor()])
    folder = ImageFolder(root / "val", transform=see)
    batches = list(stream_of(split_of(root, loader, "test", view), 6).batches(0))
    images = torch.cat([images_BHWC for images_BHWC, _ in batches])
    labels = torch.cat([labels_B for _, labels_B in batches])
    assert labels.tolist() == folder.targets
    expected = torch.stack([image for image, _ in folder]).permute(0, 2, 3, 1)
    differ = (images.int() - expected.int()).abs()
    assert differ.max().item() <= EVAL_LEVELS
    assert differ.float().mean().item() < EVAL_MEAN_LEVELS


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks(root: Path, loader: str, world_size: int) -> None:
    """To be tested, every image once; to train, equal parts of the batches of one process."""
    test = split_of(root, loader, "test")
    ranks = [stream_of(test, 6, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [list(stream.batches(0)) for stream in ranks]
    together = [
        torch.cat(parts) for step in zip(*shares, strict=True) for parts in [[p[0] for p in step]]
    ]
    assert sum(map(len, together)) == 15
    assert torch.equal(torch.cat(together), read_all(test)[0])
    train = split_of(root, loader)
    whole = list(stream_of(train, 8, **TRAIN).batches(0))
    parts = [
        list(stream_of(train, 8, **TRAIN, rank=rank, world_size=world_size).batches(0))
        for rank in range(world_size)
    ]
    for step, one in zip(zip(*parts, strict=True), whole, strict=False):
        assert {len(labels_B) for _, labels_B in step} == {8 // world_size}
        assert torch.equal(torch.cat([images for images, _ in step]), one[0])


@pytest.mark.parametrize("loader", LOADERS)
def test_more_ranks_than_images_of_the_last_batch(root: Path, loader: str) -> None:
    test = split_of(root, loader, "test")
    counts = [
        [len(labels_B) for _, labels_B in stream_of(test, 14, rank=rank, world_size=3).batches(0)]
        for rank in range(3)
    ]
    assert counts == [[4, 0], [5, 0], [5, 1]]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("fault", ["gone", "cut", "grown", "changed", "empty"])
def test_a_file_that_rots_is_named_after_the_batches_before_it(
    root: Path, tmp_path: Path, loader: str, fault: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    split = split_of(copy, loader)
    stream = stream_of(split, 4, **TRAIN)
    victim = split.path(int(stream.draws(0, 5).index_B[2]))
    content = victim.read_bytes()
    if fault == "gone":
        victim.unlink()
    elif fault == "cut":
        victim.write_bytes(content[:-400])
    elif fault == "grown":
        # It decodes as before, and isn't what was prepared; as a crop above a cut would.
        victim.write_bytes(content + b"more")
    elif fault == "changed":
        victim.write_bytes(b"x" * len(content))
    else:
        victim.write_bytes(b"")
    seen: list[Tensor] = []
    with pytest.raises(DataFileError, match=victim.name) as raised:
        seen.extend(labels_B for _, labels_B in stream.batches(0))
    assert len(seen) == 5
    assert "continue with --resume" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_images_are_held_out_of_train_by_class(root: Path) -> None:
    splits = load_dataset(
        "imagenet", root, val=6, image_size=32, eval_resize=37, loader="torchvision"
    )
    assert isinstance(splits.train, DiskSplit)
    assert isinstance(splits.val, DiskSplit)
    assert len(splits.train) == 27
    assert splits.val.labels_N.bincount().tolist() == [2, 2, 2]
    held = {splits.val.path(i) for i in range(6)}
    assert not held & {splits.train.path(i) for i in range(27)}
    images_NHWC, labels_N = read_all(splits.val)
    assert images_NHWC.shape == (6, 32, 32, 3)
    assert torch.equal(labels_N, splits.val.labels_N)


@needs_dali
def test_dali_is_chosen_where_it_is_installed(root: Path) -> None:
    splits = load_dataset("imagenet", root)
    assert splits.loader == "dali"
    assert splits.note.startswith("images are decoded by dali 2.")


def test_the_loader_is_chosen_and_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="loader is 'ffcv': choose auto"):
        load_dataset("imagenet", root, loader="ffcv")
    monkeypatch.setattr("fastokd.data.disk.dali.why_not", lambda: "no module nvidia")
    splits = load_dataset("imagenet", root)
    assert (splits.loader, splits.train.image_size) == ("torchvision", (224, 224))
    assert splits.note.startswith("images are decoded by torchvision")
    assert splits.mean == (0.485, 0.456, 0.406)
    with pytest.raises(UserError, match="isn't available: no module nvidia"):
        load_dataset("imagenet", root, loader="dali")


def test_a_streamed_folder_has_its_own_colours(root: Path) -> None:
    splits = load_dataset("imagefolder", root, streamed=True, image_size=32)
    assert isinstance(splits.train, DiskSplit)
    assert splits.mean != (0.485, 0.456, 0.406)
    assert "No test/ folder: val/ is used as the test set." in splits.note
    with pytest.raises(UserError, match="set resized_crop to true"):
        stream_of(splits.train, 4, augment=Augment(4), shuffle=True)


def test_what_isn_t_prepared_says_how(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `fastokd prepare"):
        load_dataset("imagenet", tmp_path)
