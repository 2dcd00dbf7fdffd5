"""Splits of packed images: decoded once into memory, or streamed from their shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastokd.data.disk.left_out import Seen, refuse_damage, refuse_new_damage, what_is_left_out
from fastokd.data.disk.scan import Look, scan, statistics_of
from fastokd.data.disk.split import DiskSplit
from fastokd.data.packed.hf import list_hf
from fastokd.data.packed.listing import Packed
from fastokd.data.packed.wds import list_wds
from fastokd.data.preprocessing import Preprocessing
from fastokd.data.sets import files
from fastokd.data.sets.folder import MAX_BYTES, Listing, channel_statistics, decode
from fastokd.data.splits import DatasetSplits, Split
from fastokd.errors import UserError

LISTS: dict[str, Callable[[Path], tuple[dict[str, Packed], tuple[str, ...]]]] = {
    "hf": list_hf,
    "wds": list_wds,
}
# What a set may call its validation split.
VAL = ("val", "validation", "valid", "dev")
# Images that mean and deviation of a streamed set are measured on.
SAMPLED = 1000
NO_TEST = "no test split: the validation split is used as the test set"


def load_packed(
    name: str,
    root: Path | None,
    shown: Preprocessing,
    *,
    streamed: bool = False,
    loader: str = "auto",
    workers: int = 0,
    begun: bool = False,
    kept: Mapping[str, Any] | None = None,
    own_test: bool = True,
) -> DatasetSplits:
    """A set of packed images: ``hf`` or ``wds``.

    In memory they are preprocessed as ``shown``; ``streamed`` reads the headers of all of them and decodes
    batches during training, in worker processes. Mean and deviation are measured on train, of a streamed
    set on 1,000 images. Images that can't be used are left out by the rule of ``disk/left_out.py``; of a
    streamed set, those whose header can't be read.

    A split all of whose class ids are -1 has no labels and isn't read. Without a test split the validation
    split is the test set.

    Args:
        begun, kept, own_test: as for :func:`fastokd.data.sets.folder.load_folder`.

    Raises:
        UserError: there is no such set at ``root``; class ids out of range; no split to train on; too
            many images that can't be used; more than 8 GiB in memory; another loader than torchvision.
    """
    if streamed and loader not in ("auto", "torchvision"):
        raise UserError(
            f"loader is {loader!r}, which reads files of one image: choose torchvision for {name}"
        )
    root = files.need_root(name, root)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: give the one that holds the {name} set")
    found, class_names = LISTS[name](root)
    if len(class_names) < 2:
        raise UserError(f"{root} has {len(class_names)} classes: it needs at least 2")
    packed, notes = _by_role(root, found, own_test)
    splits: dict[str, Split | DiskSplit] = {}
    seen: list[Seen] = []
    if not streamed:
        _refuse_size(root, packed, shown)
    for split, images in packed.items():
        _check_labels(root, images, len(class_names))
        if streamed:
            splits[split], faults = _stream(root, images, shown, workers)
        else:
            splits[split], faults = _in_memory(root, images, shown)
        here = [
            Seen(path, int(label), faults.get(path, ""), path in faults)
            for path, label in zip(images.names, images.labels_N, strict=True)
        ]
        if not begun:
            refuse_damage(root, class_names, here)
        elif kept is not None and split not in kept:
            refuse_new_damage(root, here, kept)
        if len(splits[split]) == 0:
            raise UserError(
                f"no image of {split} in {root} can be used (the first: {here[0].fault})"
            )
        seen += here
    train = splits["train"]
    mean, std = channel_statistics(train) if isinstance(train, Split) else _sampled(train)
    notes += filter(None, [what_is_left_out(seen)])
    return DatasetSplits(
        name=name,
        class_names=class_names,
        preprocessing=replace(shown, mean=mean, std=std),
        train=train,
        val=splits.get("val"),
        test=splits.get("test", train.select(torch.empty(0, dtype=torch.int64))),
        note="\n".join(notes),
        loader="torchvision" if streamed else "memory",
        left_out=tuple((file.path, file.fault) for file in seen if file.fault),
    )


def _by_role(
    root: Path, found: dict[str, Packed], own_test: bool
) -> tuple[dict[str, Packed], list[str]]:
    """The images of ``train``, ``val`` and ``test``, and notes on others."""
    notes, packed = [], {}
    for split, images in found.items():
        role = "val" if split in VAL else split
        if role not in ("train", "val", "test") or role in packed:
            notes.append(f"the split {split!r} isn't read")
        elif len(images) and (images.labels_N == -1).all():
            notes.append(f"the split {split!r} has no labels and isn't read")
        elif len(images):
            packed[role] = images
    if "train" not in packed:
        raise UserError(
            f"{root} has no split called train (it has {', '.join(found)}): give the folder of the whole set"
        )
    if "test" not in packed and "val" in packed and own_test:
        packed["test"] = packed.pop("val")
        notes.append(NO_TEST)
    return packed, notes


def _check_labels(root: Path, images: Packed, classes: int) -> None:
    wrong_N = (images.labels_N < 0) | (images.labels_N >= classes)
    if wrong_N.any():
        at = int(wrong_N.argmax())
        raise UserError(
            f"{root / images.names[at]} has the class {images.labels_N[at]}, but there are only classes 0 "
            f"to {classes - 1}: filter it out or correct it"
        )


def _refuse_size(root: Path, packed: dict[str, Packed], shown: Preprocessing) -> None:
    size = shown.input_size
    total = sum(map(len, packed.values())) * size**2 * 3
    if total > MAX_BYTES:
        raise UserError(
            f"{root} at {size}x{size} takes {total / 2**30:.1f} GiB of memory, and the limit is "
            f"{MAX_BYTES / 2**30:.0f}: choose a smaller image_size, or stream it from disk with "
            "--set resized_crop=true --set crop_padding=0"
        )


def _in_memory(root: Path, images: Packed, shown: Preprocessing) -> tuple[Split, dict[str, str]]:
    listing = Listing(images.names, images.labels_N.tolist())
    return decode(root, listing, shown, images.file_of(root))


def _stream(
    root: Path, images: Packed, shown: Preprocessing, workers: int
) -> tuple[DiskSplit, dict[str, str]]:
    """The images whose headers can be read, and the faults of the others."""
    looks = list(scan(root, images.names, pixels=False, file_of=images.file_of(root)))
    faults = {
        name: look.fault for name, look in zip(images.names, looks, strict=True) if look.fault
    }
    keep = [index for index, look in enumerate(looks) if not look.fault]
    return _split(root, images.select(keep), [looks[i] for i in keep], shown, workers), faults


def _split(
    root: Path, images: Packed, looks: list[Look], shown: Preprocessing, workers: int
) -> DiskSplit:
    paths = [os.fsencode(name) for name in images.names]
    place_N3 = torch.from_numpy(images.place_N3)
    sizes = [(look.height, look.width) for look in looks]
    return DiskSplit(
        root,
        np.array(paths, dtype=bytes),
        torch.from_numpy(images.labels_N),
        torch.tensor(sizes, dtype=torch.int64).view(-1, 2),
        place_N3[:, 2],
        torch.tensor([look.plain for look in looks], dtype=torch.bool),
        shown.view,
        "torchvision",
        workers,
        shards=images.shards,
        place_N2=place_N3[:, :2],
    )


def _sampled(train: DiskSplit) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of images that are evenly spaced in train."""
    places = np.linspace(0, len(train) - 1, min(SAMPLED, len(train))).round().astype(int)
    taken = np.unique(places).tolist()
    names = [os.fsdecode(train.paths_N[index]) for index in taken]
    looks = scan(
        train.root,
        names,
        sampled=range(len(taken)),
        file_of=lambda place: train.file(taken[place]),
    )
    sums = [look.sums for look in looks if look.sums is not None]
    if not sums:
        raise UserError(f"no image of train in {train.root} can be decoded: replace them")
    return statistics_of(np.array(sums))
