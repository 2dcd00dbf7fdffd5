"""SVHN's cropped digits from MATLAB's files, as torchvision lays them out."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from fastokd.data.preprocessing import preprocessing_of
from fastokd.data.sets import files
from fastokd.data.sets.labels import checked_labels
from fastokd.data.splits import DatasetSplits, Split
from fastokd.errors import UserError

SITE = "http://ufldl.stanford.edu/housenumbers/"
MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}


def load_svhn(root: Path | None, *, download: bool) -> DatasetSplits:
    """SVHN from ``root/train_32x32.mat`` and ``root/test_32x32.mat``; the file of additional images isn't
    read. Missing files are downloaded if ``download``.

    Raises:
        UserError: files are missing, empty or damaged, or have labels out of range.
    """
    root = files.need_root("svhn", root)
    if download:
        for file, md5 in MD5.items():
            files.download("svhn", SITE + file, root, md5)
    if not any((root / file).exists() for file in MD5):
        raise UserError(
            f"no svhn in {root}: there is no {' and no '.join(MD5)}; give --data-root DIR, or --download "
            "to fetch them there"
        )
    train, test = (_split(root / file) for file in MD5)
    return DatasetSplits(
        name="svhn",
        class_names=tuple(str(digit) for digit in range(10)),
        preprocessing=preprocessing_of("svhn"),
        train=train,
        val=None,
        test=test,
    )


def _split(path: Path) -> Split:
    """One file: ``X``, uint8 ``[32, 32, 3, N]``, and ``y``, ``[N, 1]``, in which 10 is the digit 0."""
    content = _arrays(files.read_file(path))
    pixels, labels = content.get("X"), content.get("y")
    whole = (
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and pixels.ndim == 4
        and pixels.shape[:3] == (32, 32, 3)
        and pixels.shape[3] > 0
    )
    if not whole:
        found = (
            f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else "nothing"
        )
        raise UserError(
            f"{path} has {found} under 'X', where SVHN has uint8 [32, 32, 3, N]: fetch it again "
            "(--download)"
        )
    assert isinstance(pixels, np.ndarray)
    labels_N = checked_labels(path, labels, len(pixels[0, 0, 0]), first=1, classes=10) + 1
    images_NHWC = np.ascontiguousarray(pixels.transpose(3, 0, 1, 2))
    return Split(torch.from_numpy(images_NHWC), labels_N % 10)


def _arrays(file: files.FileBytes) -> dict[str, object]:
    """The variables of one MATLAB file."""
    from scipy.io import loadmat  # takes long to import

    try:
        return dict(loadmat(io.BytesIO(file.data), variable_names=["X", "y"]))
    except Exception as error:  # the reader raises any exception for damaged files
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file.where} is damaged ({why}): fetch it again (--download)") from error
