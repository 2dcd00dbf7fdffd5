"""Folders of images, one folder a class, decoded once into memory.

For sets that fit there at the size they are trained at; others are streamed (``prepared.py``).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastokd.cpus import usable_cpus
from fastokd.data import files
from fastokd.data.decode import centre, read_rgb
from fastokd.data.endings import EXTENSIONS, is_image, left_out
from fastokd.data.preprocessing import preprocessing_of
from fastokd.data.splits import DatasetSplits, Split
from fastokd.data.views import View
from fastokd.errors import UserError

MAX_BYTES = 8 << 30


class Listing(NamedTuple):
    """Images of one split and their class ids, in torchvision's order."""

    paths: list[Path]
    labels: list[int]


def load_folder(root: Path | None, *, view: View) -> DatasetSplits:
    """``root/train/CLASS/*.png|jpg|...``, with ``val/`` or ``test/`` or both beside it.

    Class ids follow the sorted names of train's folders, as torchvision's ``ImageFolder``. Every
    image is seen as ``view`` says. Without ``test/``, ``val/`` is the test split, and ``note`` says
    so.

    Raises:
        UserError: a folder that is missing or empty, classes that train lacks, an image that can't
            be read, more images than memory should hold.
    """
    root = files.need_root("imagefolder", root)
    size = view.image_size
    classes = _classes(root / "train")
    with_val, with_test = (root / "val").is_dir(), (root / "test").is_dir()
    if not with_val and not with_test:
        raise UserError(f"{root} has neither val/ nor test/ beside train/: add one")
    listings = {"train": list_images(root / "train", classes)}
    if with_val and with_test:
        listings["val"] = list_images(root / "val", classes)
    listings["test"] = list_images(root / ("test" if with_test else "val"), classes)

    total = sum(len(listing.paths) for listing in listings.values()) * size**2 * 3
    if total > MAX_BYTES:
        raise UserError(
            f"{root} at {size}x{size} takes {total / 2**30:.1f} GiB of memory, and at "
            f"most {MAX_BYTES / 2**30:.0f} are taken: choose a smaller image_size, or stream it from "
            "disk with --set resized_crop=true --set crop_padding=0"
        )
    splits = {name: decode(listing, view) for name, listing in listings.items()}
    mean, std = channel_statistics(splits["train"])
    notes = (
        "" if with_test else "there is no test/: test is val/",
        left_out(root, [root / split for split in ("train", "val", "test")]),
    )
    return DatasetSplits(
        name="imagefolder",
        class_names=tuple(classes),
        preprocessing=preprocessing_of(
            "imagefolder", mean=mean, std=std, image_size=size, eval_resize=view.eval_resize
        ),
        train=splits["train"],
        val=splits.get("val"),
        test=splits["test"],
        note="; ".join(filter(None, notes)),
    )


def _classes(train: Path) -> list[str]:
    """The sorted names of train's folders; at least two."""
    if not train.is_dir():
        raise UserError(
            f"there is no folder {train}: give --data-root the folder that holds train/"
        )
    classes = sorted(entry.name for entry in os.scandir(train) if entry.is_dir())
    if len(classes) < 2:
        raise UserError(
            f"{train} has {len(classes)} folders of classes: it needs at least 2, one a class"
        )
    return classes


def list_images(folder: Path, classes: list[str]) -> Listing:
    """The images under ``folder``, class by class; every class of train's must have one there."""
    extra = sorted({entry.name for entry in os.scandir(folder) if entry.is_dir()} - set(classes))
    if extra:
        raise UserError(f"{folder} has a class {extra[0]!r} that train/ lacks: make them agree")
    listing = Listing([], [])
    for label, name in enumerate(classes):
        before = len(listing.paths)
        for parent, _, names in sorted(os.walk(folder / name, followlinks=True)):
            for file in sorted(names):
                if is_image(file):
                    listing.paths.append(Path(parent, file))
                    listing.labels.append(label)
        if len(listing.paths) == before:
            raise UserError(
                f"{folder / name} holds no image ({', '.join(EXTENSIONS)}): add some, or remove "
                "the class everywhere"
            )
    return listing


def decode(listing: Listing, view: View) -> Split:
    """Every image of ``listing`` in memory, decoded by a pool of threads."""
    size = view.image_size
    images_NHWC = np.empty((len(listing.paths), size, size, 3), np.uint8)

    def fill(index: int) -> None:
        images_NHWC[index] = centre(read_rgb(listing.paths[index]), view)

    pool = ThreadPoolExecutor(max_workers=min(8, usable_cpus()))
    try:
        for _ in pool.map(fill, range(len(listing.paths))):
            pass
    finally:
        # After one damaged image the rest needn't be read.
        pool.shutdown(cancel_futures=True)
    return Split(torch.from_numpy(images_NHWC), torch.tensor(listing.labels))


def channel_statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, for images in [0, 1], exact in float64."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts_3L = torch.stack(
        [torch.bincount(split.images_NHWC[..., c].flatten(), minlength=256) for c in range(3)]
    ).double()
    share_3L = counts_3L / counts_3L.sum(1, keepdim=True)
    mean_3 = share_3L @ levels
    # A channel without contrast must not be divided by nothing.
    std_3 = ((share_3L * (levels - mean_3[:, None]) ** 2).sum(1).sqrt()).clamp(min=1 / 255)
    return tuple(mean_3.tolist()), tuple(std_3.tolist())
