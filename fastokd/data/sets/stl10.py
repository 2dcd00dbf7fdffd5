"""STL-10 from its binary files, as torchvision lays them out, unpacked or as the archive."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from fastokd.data.preprocessing import preprocessing_of
from fastokd.data.sets import files
from fastokd.data.sets.files import FileBytes
from fastokd.data.sets.labels import checked_labels
from fastokd.data.splits import DatasetSplits, Split
from fastokd.errors import UserError

FOLDER = "stl10_binary"
ARCHIVE = "stl10_binary.tar.gz"
URL = f"http://ai.stanford.edu/~acoates/stl10/{ARCHIVE}"
MD5 = "91f7769df0f17e558f3565bffb0c7dfb"
FILES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
# As in class_names.txt.
CLASS_NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
SIZE = 96
# The archive holds 100,000 unlabelled images beside the labelled ones.
LARGEST = 1 << 32


def load_stl10(root: Path | None, *, download: bool) -> DatasetSplits:
    """STL-10's 5,000 training and 8,000 test images, 96x96, from ``root/stl10_binary``, ``root`` or the
    archive. The unlabelled images and the ten folds aren't read.

    ``download`` fetches the archive (2.6 GB) if files are missing, and unpacks the four files beside it.

    Raises:
        UserError: files are missing, empty or damaged, or have labels out of range.
    """
    content = _read(files.need_root("stl10", root), download)
    return DatasetSplits(
        name="stl10",
        class_names=CLASS_NAMES,
        preprocessing=preprocessing_of("stl10"),
        train=_split(content["train_X.bin"], content["train_y.bin"]),
        val=None,
        test=_split(content["test_X.bin"], content["test_y.bin"]),
    )


def _read(root: Path, download: bool) -> dict[str, FileBytes]:
    """The bytes of the four files, from the folder or the archive."""
    folders = [root / FOLDER, *([root] if root.name == FOLDER else [])]
    for folder in folders:
        # A folder that lacks files is an error, but with --download only a reason to fetch.
        if folder.is_dir() and not (download and any(not (folder / f).exists() for f in FILES)):
            return {file: files.read_file(folder / file) for file in FILES}
    archive = root / ARCHIVE
    if download:
        files.download("stl10", URL, root, MD5)
    if not archive.is_file():
        raise UserError(
            f"no stl10 in {root}: there is neither {FOLDER}/ nor {ARCHIVE}; give --data-root DIR, or "
            "--download to fetch it there"
        )
    members = files.read_members(archive, [f"{FOLDER}/{file}" for file in FILES], LARGEST)
    content = {file: members[f"{FOLDER}/{file}"] for file in FILES}
    if download:
        _unpack(content, root / FOLDER)
    return content


def _unpack(content: dict[str, FileBytes], folder: Path) -> None:
    """Writes the files, since reading them from the archive again takes a minute."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, file in content.items():
            unfinished = folder / f"{name}.part"
            unfinished.write_bytes(file.data)
            os.replace(unfinished, folder / name)
    except OSError as error:
        raise UserError(
            f"can't unpack stl10 into {folder} ({error.strerror or error}): make room there, or give "
            "another --data-root"
        ) from error


def _split(images: FileBytes, labels: FileBytes) -> Split:
    """One split: planes whose columns are contiguous, and class ids from 1."""
    each = 3 * SIZE**2
    if len(images.data) % each:
        raise UserError(
            f"{images.where} has {len(images.data):,} bytes, which isn't a multiple of an image's "
            f"{each:,}: fetch it again (--download)"
        )
    planes_N3WH = np.frombuffer(images.data, np.uint8).reshape(-1, 3, SIZE, SIZE)
    found = np.frombuffer(labels.data, np.uint8)
    labels_N = checked_labels(Path(labels.where), found, len(planes_N3WH), first=1, classes=10)
    # A copy, since bytes are read-only, which tensors don't support.
    images_NHWC = np.array(planes_N3WH.transpose(0, 3, 2, 1), order="C")
    return Split(torch.from_numpy(images_NHWC), labels_N)
