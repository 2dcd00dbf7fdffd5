"""Fashion-MNIST from its IDX files, 28x28 set into black 32x32."""

from __future__ import annotations

from pathlib import Path

import torch

from fastokd.data.preprocessing import preprocessing_of
from fastokd.data.sets import files
from fastokd.data.sets.idx import read_idx
from fastokd.data.splits import DatasetSplits, Split
from fastokd.errors import UserError

CLASS_NAMES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SHOWN = preprocessing_of("fashion_mnist")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SITE = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}


def load_fashion_mnist(root: Path | None, *, download: bool) -> DatasetSplits:
    """Fashion-MNIST from ``root/FashionMNIST/raw`` or ``root``; without ``root``, from Debian's package.

    Raises:
        UserError: files are missing, empty or damaged, or have labels out of range.
    """
    folder = _find(root)
    if folder is None and download:
        folder = files.need_root("fashion_mnist", root) / "FashionMNIST" / "raw"
        for file, md5 in MD5.items():
            files.download("fashion_mnist", SITE + file, folder, md5)
    if folder is None:
        places = [str(place) for place in _places(root)]
        raise UserError(
            f"no fashion_mnist in {', '.join(places)}: install Debian's dataset-fashion-mnist, "
            "or give --data-root DIR, with --download to fetch it there"
        )
    return DatasetSplits(
        name="fashion_mnist",
        class_names=CLASS_NAMES,
        preprocessing=SHOWN,
        train=_split(folder, "train"),
        val=None,
        test=_split(folder, "t10k"),
        note=f"read from {folder}",
    )


def _places(root: Path | None) -> list[Path]:
    if root is None:
        return [DEBIAN]
    root = files.need_root("fashion_mnist", root)
    return [root / "FashionMNIST" / "raw", root]


def _find(root: Path | None) -> Path | None:
    """The first place with any of the files; reading raises if one is missing."""
    for place in _places(root):
        if any((place / name).exists() or (place / name[:-3]).exists() for name in MD5):
            return place
    return None


def _split(folder: Path, prefix: str) -> Split:
    images_path, labels_path = (
        raw if (raw := folder / f"{prefix}-{kind}-ubyte").exists() else folder / f"{raw.name}.gz"
        for kind in ("images-idx3", "labels-idx1")
    )
    pixels, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if pixels.shape[1:] != (28, 28):
        raise UserError(
            f"{images_path} has images of {pixels.shape[1]}x{pixels.shape[2]}, where "
            "Fashion-MNIST's have 28x28: give the folder of Fashion-MNIST"
        )
    if len(labels) != len(pixels):
        raise UserError(
            f"{images_path} has {len(pixels)} images but {labels_path.name} has {len(labels)} "
            "labels: fetch them again (--download)"
        )
    if labels.max() >= len(CLASS_NAMES):
        raise UserError(
            f"{labels_path} has a label {labels.max()}, but there are only classes 0 to "
            f"{len(CLASS_NAMES) - 1}: fetch it again (--download)"
        )
    images_NHWC = SHOWN.from_native(torch.from_numpy(pixels))
    return Split(images_NHWC, torch.from_numpy(labels).long())
