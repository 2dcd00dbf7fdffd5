"""Writes small, valid data sets for tests: CIFAR's pickles, IDX files, folders of images."""

from __future__ import annotations

import gzip
import io
import pickle
import shutil
import struct
import tarfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from fastokd.data.sets.draw_glyphs import split_of

# Fonts that matplotlib ships, and whose data they become.
SHIPPED = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
TEXT = {
    "DejaVuSans": "train",
    "DejaVuSerif": "train",
    "DejaVuSansMono": "val",
    "STIXGeneral": "test",
    "DejaVuSans-Bold": "train",
    "cmss10": "train",
}


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Spells bytes and arrays as Python 2 and numpy 1 did when CIFAR was pickled."""

    dispatch = pickle._Pickler.dispatch.copy()  # type: ignore[attr-defined]

    def save_string(self, text: bytes | str) -> None:
        value = text.encode() if isinstance(text, str) else text
        if len(value) < 256:
            self.write(b"U" + bytes([len(value)]) + value)
        else:
            self.write(b"T" + struct.pack("<i", len(value)) + value)
        self.memoize(text)

    dispatch[bytes] = dispatch[str] = save_string


def python2_pickle(value: Any) -> bytes:
    """Protocol 2 as CIFAR's own files have it."""
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.", b"numpy.core.")


def cifar_content(
    name: str, count: int, generator: np.random.Generator, first_label: int = 0
) -> dict[bytes, Any]:
    """One CIFAR file's dictionary: ``count`` random images, labels counting up from one."""
    classes = 10 if name == "cifar10" else 100
    labels = [(first_label + index) % classes for index in range(count)]
    content: dict[bytes, Any] = {
        b"batch_label": b"synthetic",
        b"data": generator.integers(256, size=(count, 3072), dtype=np.uint8),
        b"filenames": [b"%d.png" % index for index in range(count)],
    }
    if name == "cifar10":
        content[b"labels"] = labels
    else:
        content[b"fine_labels"] = labels
        content[b"coarse_labels"] = [label // 5 for label in labels]
    return content


def write_cifar(root: Path, name: str, *, train: int = 100, test: int = 20, seed: int = 0) -> Path:
    """``train`` and ``test`` images as torchvision lays them out; returns the folder."""
    generator = np.random.default_rng(seed)
    folder = root / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
    folder.mkdir(parents=True)
    parts = [f"data_batch_{i}" for i in range(1, 6)] if name == "cifar10" else ["train"]
    for index, part in enumerate(parts):
        count = train // len(parts)
        content = cifar_content(name, count, generator, index * count)
        (folder / part).write_bytes(python2_pickle(content))
    test_name = "test_batch" if name == "cifar10" else "test"
    (folder / test_name).write_bytes(python2_pickle(cifar_content(name, test, generator)))
    return folder


def pack(folder: Path, archive: Path) -> None:
    """A ``.tar.gz`` with ``folder`` under its own name."""
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)


def idx_bytes(array: np.ndarray) -> bytes:
    """An IDX file's content."""
    return (
        bytes((0, 0, 8, array.ndim))
        + struct.pack(f">{array.ndim}I", *array.shape)
        + (array.astype(np.uint8).tobytes())
    )


def write_fashion_mnist(
    folder: Path, *, train: int = 50, test: int = 20, compressed: bool = True, seed: int = 0
) -> Path:
    """The four IDX files in ``folder``, labels counting up from 0; returns the folder."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", train), ("t10k", test)):
        pixels = generator.integers(256, size=(count, 28, 28), dtype=np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.arange(count) % 10)):
            content = idx_bytes(array)
            path = folder / f"{prefix}-{kind}-ubyte"
            if compressed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)
    return folder


def write_folder(
    root: Path,
    *,
    splits: tuple[str, ...] = ("train", "val"),
    classes: tuple[str, ...] = ("cat", "dog"),
    count: int = 4,
    size: tuple[int, int] = (32, 32),
    seed: int = 0,
) -> Path:
    """``count`` PNG images of ``size`` (width, height) in each split and class; returns ``root``."""
    generator = np.random.default_rng(seed)
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def write_fonts(root: Path) -> Path:
    """Families of one font each: four for training, one for validation and one to test."""
    for name, split in TEXT.items():
        numbers = (f"{name}-{number}" for number in range(100))
        family = root / next(family for family in numbers if split_of(family) == split)
        family.mkdir(parents=True)
        shutil.copy(SHIPPED / f"{name}.ttf", family)
    return root
