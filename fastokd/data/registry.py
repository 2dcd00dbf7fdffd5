"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fastokd.data.cifar import load_cifar
from fastokd.data.digits import load_digits_splits
from fastokd.data.fashion_mnist import load_fashion_mnist
from fastokd.data.folder import load_folder
from fastokd.data.splits import DatasetSplits, stratified_split
from fastokd.errors import UserError, unknown_name


class _Request(NamedTuple):
    """What a caller asks of a data set; each takes what concerns it."""

    root: Path | None
    download: bool
    image_size: int


_LOADERS: dict[str, Callable[[_Request], DatasetSplits]] = {
    "cifar10": lambda ask: load_cifar("cifar10", ask.root, download=ask.download),
    "cifar100": lambda ask: load_cifar("cifar100", ask.root, download=ask.download),
    "digits": lambda ask: load_digits_splits(),
    "fashion_mnist": lambda ask: load_fashion_mnist(ask.root, download=ask.download),
    "imagefolder": lambda ask: load_folder(ask.root, image_size=ask.image_size),
}


def list_datasets() -> list[str]:
    """The names that :func:`load_dataset` takes."""
    return sorted(_LOADERS)


def load_dataset(
    name: str,
    root: Path | None = None,
    *,
    val: int = 0,
    seed: int = 0,
    download: bool = False,
    image_size: int = 32,
) -> DatasetSplits:
    """A data set in memory, on the CPU, as uint8 ``[N, H, W, 3]``.

    Args:
        name: as in :func:`list_datasets`.
        root: the folder that holds its files (docs/data.md); ``digits`` needs none, and
            ``fashion_mnist`` none where Debian's package is installed.
        val: images held out of train, stratified by class; 0 holds out none. ``digits``, and image
            folders with ``val/`` and ``test/``, come with a validation split of their own.
        seed: of the choice of those images.
        download: fetches what is missing into ``root`` (CIFAR, Fashion-MNIST).
        image_size: height and width of the images of an ``imagefolder``; the others have 32.

    Raises:
        UserError: an unknown name; files that are missing, empty or damaged; labels out of range;
            a ``val`` that can't be held out.
    """
    if name not in _LOADERS:
        raise unknown_name("dataset", name, _LOADERS)
    if image_size != 32 and name != "imagefolder":
        raise UserError(f"image_size is {image_size}, but {name} is shown at 32: leave it out")
    splits = _LOADERS[name](_Request(root, download, image_size))
    if val == 0:
        return splits
    if splits.val is not None:
        if val == len(splits.val):
            return splits
        raise UserError(
            f"val is {val}, but {name} comes with {len(splits.val)} images to validate: leave it 0"
        )
    kept, held = stratified_split(splits.train.labels_N, val, seed)
    return replace(splits, train=splits.train.select(kept), val=splits.train.select(held))
