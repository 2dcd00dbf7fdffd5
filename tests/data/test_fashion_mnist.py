"""Fashion-MNIST and the IDX files it comes in."""

from __future__ import annotations

import gzip
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastokd.data import load_dataset
from fastokd.data.sets import fashion_mnist
from fastokd.data.sets.idx import read_idx
from fastokd.errors import UserError
from tests.data.make import idx_bytes, write_fashion_mnist


@pytest.fixture(autouse=True)
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Debian's package would be: not on this machine, whatever it has installed."""
    folder = tmp_path / "debian"
    monkeypatch.setattr(fashion_mnist, "DEBIAN", folder)
    return folder


@pytest.mark.parametrize("compressed", [True, False])
def test_images_sit_in_a_black_border(compressed: bool, tmp_path: Path) -> None:
    folder = write_fashion_mnist(tmp_path / "set", compressed=compressed)
    splits = load_dataset("fashion_mnist", folder)
    assert (len(splits.train), len(splits.test), splits.num_classes) == (50, 20, 10)
    images_NHWC = splits.test.images_NHWC
    assert images_NHWC.shape == (20, 32, 32, 3)
    if not compressed:
        raw = (folder / "t10k-images-idx3-ubyte").read_bytes()[16:]
        pixels = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(20, 28, 28)
        for channel in range(3):
            assert torch.equal(images_NHWC[:, 2:30, 2:30, channel], pixels)
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert int(images_NHWC[:, border].max()) == 0
    assert splits.test.labels_N.tolist() == [index % 10 for index in range(20)]


def test_places_in_order(tmp_path: Path, debian: Path) -> None:
    """torchvision's layout, then the folder itself; Debian's package only where no root is given."""
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(UserError, match=rf"no fashion_mnist in {debian}: install Debian's"):
        load_dataset("fashion_mnist")
    write_fashion_mnist(debian)
    assert load_dataset("fashion_mnist").note == f"read from {debian}"
    with pytest.raises(UserError, match=rf"no fashion_mnist in .*{root}: .* --data-root"):
        load_dataset("fashion_mnist", root)
    for place in (root, root / "FashionMNIST" / "raw"):
        write_fashion_mnist(place)
        assert load_dataset("fashion_mnist", root).note == f"read from {place}"


def test_missing_file_is_named(tmp_path: Path) -> None:
    folder = write_fashion_mnist(tmp_path / "set")
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte\.gz is missing"):
        load_dataset("fashion_mnist", folder)


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("train-images-idx3-ubyte", np.zeros((50, 28, 27)), "images of 28x27"),
        ("train-labels-idx1-ubyte", np.zeros(49), "has 49 labels: fetch them again"),
        ("t10k-labels-idx1-ubyte", np.full(20, 10), "a label 10, .* classes 0 to 9"),
        ("t10k-labels-idx1-ubyte", np.zeros((20, 1)), "IDX file of 1 dimensions"),
    ],
)
def test_other_contents_are_named(name: str, array: np.ndarray, says: str, tmp_path: Path) -> None:
    folder = write_fashion_mnist(tmp_path / "set", compressed=False)
    (folder / name).write_bytes(idx_bytes(array))
    with pytest.raises(UserError, match=rf"{re.escape(name)}.* {says}"):
        load_dataset("fashion_mnist", folder)


IMAGES = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda whole: b"", "is empty"),
        (lambda whole: whole[:7], "begins with 00 00 08 03"),
        (lambda whole: b"\x00\x00\x0d" + whole[3:], "begins with 00 00 0d 03"),
        (lambda whole: whole[:3] + b"\x02" + whole[4:], "of 3 dimensions begins with 00 00 08 03"),
        (lambda whole: whole[:-1], "announces 24 bytes and has only 23"),
        (lambda whole: whole[:16], "announces 24 bytes and has only 0"),
        (lambda whole: whole + b"\x00", "announces 24 bytes and has more"),
        (lambda whole: whole[:4] + bytes(4) + whole[8:], "says that it holds 0 x 3 x 4"),
        (lambda whole: whole[:4] + b"\xff" * 12 + whole[16:], "says that it holds 4294967295 x"),
    ],
)
def test_lying_headers_are_refused(
    change: Callable[[bytes], bytes], says: str, compressed: bool, tmp_path: Path
) -> None:
    path = tmp_path / ("file.gz" if compressed else "file")
    content = change(IMAGES)
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} .*{says}"):
        read_idx(path, 3)


def test_a_lying_header_allocates_nothing(tmp_path: Path) -> None:
    """A gigabyte announced, a kilobyte there."""
    path = tmp_path / "file"
    path.write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", 1, 1 << 15, 1 << 15) + bytes(1024))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="has only 1024"):
            read_idx(path, 3)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_gzip_of_zeros_ends_where_the_header_says(tmp_path: Path) -> None:
    """64 MiB behind a header of 24 bytes: only one byte more is looked at."""
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(IMAGES + bytes(64 << 20), compresslevel=1))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="and has more"):
            read_idx(path, 3)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    whole = gzip.compress(IMAGES)
    flipped = bytearray(whole)
    flipped[-6] ^= 1
    for content in (b"no gzip here", whole[:-1], whole[:15], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"file\.gz is damaged"):
            read_idx(path, 3)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(IMAGES) - 1), st.integers(0, 255)), max_size=5),
    st.integers(0, len(IMAGES)),
    st.booleans(),
    st.booleans(),
)
def test_damage_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[int, int]],
    length: int,
    compressed: bool,
    inside: bool,
) -> None:
    """Changed inside the compressed stream or before compression, cut or not."""
    content = bytearray(gzip.compress(IMAGES) if compressed and inside else IMAGES)
    for position, value in changes:
        content[position % len(content)] = value
    cut = bytes(content[: length if length < len(IMAGES) // 2 else None])
    path = tmp_path_factory.getbasetemp() / ("fuzz.gz" if compressed else "fuzz")
    path.write_bytes(gzip.compress(cut) if compressed and not inside else cut)
    try:
        array = read_idx(path, 3)
    except UserError:
        return
    assert array.ndim == 3
    assert array.size == 24


def test_download_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_fashion_mnist(tmp_path / "made")
    calls = {}

    def fetch(url: str, root: str, filename: str | None = None, md5: str | None = None) -> None:
        name = url.rsplit("/", 1)[1]
        calls[name] = md5
        Path(root, name).write_bytes((made / name).read_bytes())

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    assert len(load_dataset("fashion_mnist", tmp_path / "new", download=True).train) == 50
    from torchvision.datasets import FashionMNIST

    assert calls == dict(FashionMNIST.resources)
    assert fashion_mnist.SITE in FashionMNIST.mirrors
