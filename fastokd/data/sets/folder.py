"""Folders of images, one folder a class, decoded once into memory.

For sets that fit there at the size they are trained at; others are streamed (``prepared.py``).
Both leave damaged files out by the rule of ``left_out.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastokd.data.decode import ImageBytes, without_warnings
from fastokd.data.disk.layout import (
    NO_TEST,
    Layout,
    find_layout,
    held_out_folders,
    is_unsplit,
    shortened,
)
from fastokd.data.disk.left_out import Seen, refuse_damage, refuse_new_damage, what_is_left_out
from fastokd.data.disk.scan import look_at, statistics_of, sums_of
from fastokd.data.preprocessing import Preprocessing
from fastokd.data.sets import files
from fastokd.data.splits import DatasetSplits, Split
from fastokd.data.waits import by_threads
from fastokd.errors import LoaderError, UserError
from fastokd.host.cpus import usable_cpus

MAX_BYTES = 8 << 30


class Listing(NamedTuple):
    """Images of one split, from the root, and their class ids, in torchvision's order."""

    paths: list[str]
    labels: list[int]


def load_folder(
    root: Path | None,
    shown: Preprocessing,
    *,
    begun: bool = False,
    kept: Mapping[str, Any] | None = None,
    own_test: bool = True,
) -> DatasetSplits:
    """``root/train/CLASS/*.png|jpg|...`` with ``val/`` or ``test/`` or both beside it, or
    ``root/CLASS/*``, whose test split has no images.

    Class ids follow the sorted names of train's folders, as torchvision's ``ImageFolder``. Images are
    preprocessed as ``shown``, with train's mean and deviation. Without ``test/``, ``val/`` is the test
    split, and ``note`` says so. Damaged files are left out.

    Args:
        begun: a run that has begun isn't refused for the number of its damaged files.
        kept: what it keeps of its data. It is refused for a file that was damaged since, unless the file
            is in its lists, which are checked where they are read.
        own_test: False if a test split will be drawn from train, so that ``val/`` is no test split.

    Raises:
        UserError: as :func:`find_layout` and :func:`refuse_damage`, or the images exceed 8 GiB.
    """
    root = files.need_root("imagefolder", root)
    layout = find_layout(root)
    there = {split for split, _, _ in layout.files}
    folders = {"train": "train", **held_out_folders("imagefolder", there, own_test=own_test)}
    splits = load_layout(root, layout, folders, shown, begun=begun, kept=kept)
    assert isinstance(splits.train, Split)
    mean, std = channel_statistics(splits.train)
    return replace(splits, preprocessing=replace(shown, mean=mean, std=std))


def load_layout(
    root: Path,
    layout: Layout,
    folders: Mapping[str, str],
    shown: Preprocessing,
    *,
    name: str = "imagefolder",
    begun: bool = False,
    kept: Mapping[str, Any] | None = None,
) -> DatasetSplits:
    """The images of ``layout`` in memory, without those that are damaged.

    Args:
        folders: the layout's folder of each split; a set without a test split gets an empty one.
        shown: how they are preprocessed.
        name: the data set's.
        begun, kept: as for :func:`load_folder`, whose errors this raises.
    """
    size = shown.input_size
    listings = {split: _listing(layout, folder) for split, folder in folders.items()}
    total = sum(len(listing.paths) for listing in listings.values()) * size**2 * 3
    if total > MAX_BYTES:
        streamed = (
            ", or stream it from disk with --set resized_crop=true --set crop_padding=0"
            if name == "imagefolder"
            else ""
        )
        raise UserError(
            f"{root} at {size}x{size} takes {total / 2**30:.1f} GiB of memory, and the limit is "
            f"{MAX_BYTES / 2**30:.0f}: choose a smaller image_size{streamed}"
        )
    splits, seen = {}, []
    for split, folder in folders.items():
        splits[split], damaged = decode(root, listings[split], shown)
        files_here = _seen(layout, folder, damaged)
        where = root if folder == "train" and is_unsplit(root) else root / folder
        if not begun:
            refuse_damage(where, layout.classes, files_here)
        elif kept is not None and split not in kept:
            refuse_new_damage(where, files_here, kept)
        if len(splits[split]) == 0:
            fault = next(file.fault for file in files_here)
            raise UserError(f"no image in {where} can be used (the first: {fault}): add some")
        seen += files_here
    notes = [NO_TEST] if folders.get("test") == "val" and name == "imagefolder" else []
    notes += [*shortened(layout.notes), *filter(None, [what_is_left_out(seen)])]
    return DatasetSplits(
        name=name,
        class_names=tuple(layout.classes),
        preprocessing=shown,
        train=splits["train"],
        val=splits.get("val"),
        test=splits.get("test", splits["train"].select(torch.empty(0, dtype=torch.int64))),
        note="\n".join(notes),
        left_out=tuple((file.path, file.fault) for file in seen if file.fault),
    )


def _listing(layout: Layout, folder: str) -> Listing:
    """The images of one folder of classes that may be decoded."""
    usable = layout.usable(folder)
    return Listing([path for path, _ in usable], [label for _, label in usable])


def _seen(layout: Layout, folder: str, damaged: dict[str, str]) -> list[Seen]:
    """Every file of one folder; ``damaged`` are the faults that decoding found, by path."""
    return [
        Seen(path, label, layout.faults.get(path) or damaged.get(path, ""), path in damaged)
        for split, path, label in layout.files
        if split == folder
    ]


def decode(
    root: Path,
    listing: Listing,
    shown: Preprocessing,
    file_of: Callable[[int], Path | ImageBytes] | None = None,
) -> tuple[Split, dict[str, str]]:
    """The images of ``listing`` in memory, decoded by a pool of threads, and the fault of each file that
    can't be.

    Args:
        file_of: the picture at each place of ``listing``, if it isn't a file below ``root``.

    Raises:
        LoaderError: memory or file descriptors ran out.
    """
    size = shown.input_size
    images_NHWC = np.empty((len(listing.paths), size, size, 3), np.uint8)

    opened = file_of or (lambda index: root / listing.paths[index])

    def fill(index: int) -> str:
        try:
            images_NHWC[index] = shown.read(opened(index))
        except LoaderError:
            raise
        except UserError as error:
            return look_at(opened(index)).fault or str(error)
        return ""

    indices = range(len(listing.paths))
    threads = min(8, usable_cpus())
    with without_warnings():
        faults = list(by_threads(fill, indices, threads, lambda index: listing.paths[index]))
    paths_N = np.array([os.fsencode(path) for path in listing.paths], dtype=bytes)
    split = Split(
        torch.from_numpy(images_NHWC), torch.tensor(listing.labels, dtype=torch.int64), paths_N
    )
    damaged = {path: fault for path, fault in zip(listing.paths, faults, strict=True) if fault}
    if damaged:
        split = split.select(torch.tensor([not fault for fault in faults]).nonzero()[:, 0])
    return split, damaged


def channel_statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, for images in [0, 1]."""
    parts = split.images_NHWC.split(1024)  # in parts, since counting takes eight bytes a value
    return statistics_of(np.array([sums_of(part.numpy()) for part in parts]))
