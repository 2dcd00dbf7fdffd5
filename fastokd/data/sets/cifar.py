"""CIFAR-10 and CIFAR-100, as torchvision lays them out, unpacked or as the archive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastokd.data.preprocessing import preprocessing_of
from fastokd.data.sets import files
from fastokd.data.sets.files import FileBytes
from fastokd.data.sets.plain_pickle import read_plain_pickle
from fastokd.data.splits import DatasetSplits, Split
from fastokd.errors import UserError

SITE = "https://www.cs.toronto.edu/~kriz/"
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree
orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum
rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train
trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


@dataclass(frozen=True)
class CifarFiles:
    """The files of a CIFAR and their content."""

    folder: str
    archive: str
    md5: str
    train: tuple[str, ...]
    test: str
    label: str
    class_names: tuple[str, ...]


CIFAR = {
    "cifar10": CifarFiles(
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        train=tuple(f"data_batch_{index}" for index in range(1, 6)),
        test="test_batch",
        label="labels",
        class_names=tuple(CIFAR10.split()),
    ),
    "cifar100": CifarFiles(
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        train=("train",),
        test="test",
        label="fine_labels",
        class_names=tuple(CIFAR100.split()),
    ),
}


def load_cifar(name: str, root: Path | None, *, download: bool) -> DatasetSplits:
    """``cifar10`` or ``cifar100`` from ``root``; missing files are downloaded if ``download``.

    Raises:
        UserError: files are missing, empty or damaged, or have labels out of range.
    """
    cifar = CIFAR[name]
    root = files.need_root(name, root)
    content = _read(name, cifar, root, download)
    parts = [_split(content[file], cifar) for file in cifar.train]
    train = Split(
        torch.cat([part.images_NHWC for part in parts]),
        torch.cat([part.labels_N for part in parts]),
    )
    return DatasetSplits(
        name=name,
        class_names=cifar.class_names,
        preprocessing=preprocessing_of(name),
        train=train,
        val=None,
        test=_split(content[cifar.test], cifar),
    )


def _read(name: str, cifar: CifarFiles, root: Path, download: bool) -> dict[str, FileBytes]:
    """The bytes of every file, from the folder or the archive."""
    wanted = [*cifar.train, cifar.test]
    # The root may be the parent, as torchvision has it, or the folder itself.
    folders = [root / cifar.folder, *([root] if root.name == cifar.folder else [])]
    for folder in folders:
        # A folder that lacks files is an error, but with --download only a reason to fetch.
        if folder.is_dir() and not (download and any(not (folder / f).exists() for f in wanted)):
            return {file: files.read_file(folder / file) for file in wanted}
    archive = root / cifar.archive
    if download:
        files.download(name, SITE + cifar.archive, root, cifar.md5)
    if not archive.is_file():
        raise UserError(
            f"no {name} in {root}: there is neither {cifar.folder}/ nor {cifar.archive}; "
            "give --data-root DIR, or --download to fetch it there"
        )
    members = files.read_members(archive, [f"{cifar.folder}/{file}" for file in wanted])
    return {file: members[f"{cifar.folder}/{file}"] for file in wanted}


def _split(file: FileBytes, cifar: CifarFiles) -> Split:
    """One pickled file, its planes turned into ``[N, 32, 32, 3]``, everything checked."""
    content = read_plain_pickle(file.data, file.where)
    pixels = content.get("data")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2:
        raise UserError(f"{file.where} has no images under 'data': fetch it again (--download)")
    if pixels.shape[1] != 3 * 32 * 32 or not len(pixels):
        raise UserError(
            f"{file.where} has {pixels.shape[0]} images of {pixels.shape[1]} bytes, where CIFAR's "
            "have 3072: fetch it again (--download)"
        )
    labels = _labels(content.get(cifar.label), file.where, cifar.label)
    if len(labels) != len(pixels):
        raise UserError(
            f"{file.where} has {len(pixels)} images but {len(labels)} labels: "
            "fetch it again (--download)"
        )
    C = len(cifar.class_names)
    wrong = (labels < 0) | (labels >= C)
    if wrong.any():
        where = int(wrong.argmax())
        raise UserError(
            f"{file.where} labels image {where} as class {labels[where]}, but there are only "
            f"classes 0 to {C - 1}: fetch it again (--download)"
        )
    images_NHWC = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    # np.array copies, since the pickle's array is read-only, which tensors don't support.
    return Split(
        torch.from_numpy(np.array(images_NHWC, order="C")),
        torch.from_numpy(labels.astype(np.int64)),
    )


def _labels(values: Any, where: str, key: str) -> np.ndarray:
    """Labels as an integer array, from a list or an array."""
    if isinstance(values, list) and all(type(v) is int and abs(v) < 1 << 31 for v in values):
        return np.array(values, dtype=np.int64)
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iu":
        return values
    raise UserError(f"{where} has no list of class ids under {key!r}: fetch it again (--download)")
