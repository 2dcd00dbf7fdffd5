"""Folders of images, one folder a class, decoded once into memory.

For sets that fit there at the size they are trained at; others are streamed (``prepared.py``).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastokd.data.disk.layout import (
    Layout,
    find_layout,
    held_out_folders,
    shortened,
    what_is_left_out,
)
from fastokd.data.disk.scan import statistics_of, sums_of
from fastokd.data.preprocessing import Preprocessing
from fastokd.data.sets import files
from fastokd.data.splits import DatasetSplits, Split
from fastokd.data.waits import by_threads
from fastokd.errors import UserError
from fastokd.host.cpus import usable_cpus

MAX_BYTES = 8 << 30


class Listing(NamedTuple):
    """Images of one split and their class ids, in torchvision's order."""

    paths: list[Path]
    labels: list[int]


def load_folder(root: Path | None, shown: Preprocessing) -> DatasetSplits:
    """``root/train/CLASS/*.png|jpg|...``, with ``val/`` or ``test/`` or both beside it.

    Class ids follow the sorted names of train's folders, as torchvision's ``ImageFolder``. Images are
    preprocessed as ``shown``, with train's mean and deviation. Without ``test/``, ``val/`` is the test
    split, and ``note`` says so.

    Raises:
        UserError: as :func:`find_layout`, an image can't be read, or the images exceed 8 GiB.
    """
    root = files.need_root("imagefolder", root)
    size = shown.input_size
    layout = find_layout(root)
    folders = held_out_folders("imagefolder", {split for split, _, _ in layout.files})
    listings = {
        split: _listing(layout, root, folder)
        for split, folder in {"train": "train", **folders}.items()
    }
    total = sum(len(listing.paths) for listing in listings.values()) * size**2 * 3
    if total > MAX_BYTES:
        raise UserError(
            f"{root} at {size}x{size} takes {total / 2**30:.1f} GiB of memory, and the limit is "
            f"{MAX_BYTES / 2**30:.0f}: choose a smaller image_size, or stream it from disk with "
            "--set resized_crop=true --set crop_padding=0"
        )
    splits = {name: decode(listing, shown) for name, listing in listings.items()}
    mean, std = channel_statistics(splits["train"])
    return DatasetSplits(
        name="imagefolder",
        class_names=tuple(layout.classes),
        preprocessing=replace(shown, mean=mean, std=std),
        train=splits["train"],
        val=splits.get("val"),
        test=splits["test"],
        note=_note(layout, ("train", *folders.values())),
    )


def _listing(layout: Layout, root: Path, folder: str) -> Listing:
    """The images of one folder of classes; at least one."""
    usable = layout.usable(folder)
    if not usable:
        fault = next(layout.faults[path] for split, path, _ in layout.files if split == folder)
        raise UserError(f"no image in {root / folder} can be used (the first: {fault}): add some")
    return Listing([root / path for path, _ in usable], [label for _, label in usable])


def _note(layout: Layout, folders: tuple[str, ...]) -> str:
    parts = [] if "test" in folders else ["there is no test/: test is val/"]
    parts += shortened(layout.notes)
    files = [path for split, path, _ in layout.files if split in folders]
    faults = [(path, layout.faults[path]) for path in files if path in layout.faults]
    if faults:
        parts.append(what_is_left_out(faults, len(files), "left out"))
    return "; ".join(parts)


def decode(listing: Listing, shown: Preprocessing) -> Split:
    """Every image of ``listing`` in memory, decoded by a pool of threads."""
    size = shown.input_size
    images_NHWC = np.empty((len(listing.paths), size, size, 3), np.uint8)

    def fill(index: int) -> None:
        images_NHWC[index] = shown.read(listing.paths[index])

    indices = range(len(listing.paths))
    threads = min(8, usable_cpus())
    for _ in by_threads(fill, indices, threads, lambda index: str(listing.paths[index])):
        pass
    return Split(torch.from_numpy(images_NHWC), torch.tensor(listing.labels))


def channel_statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, for images in [0, 1]."""
    parts = split.images_NHWC.split(1024)  # in parts, since counting takes eight bytes a value
    return statistics_of(np.array([sums_of(part.numpy()) for part in parts]))
