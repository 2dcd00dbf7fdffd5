"""Batches of a split, in memory or on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastokd.data.augment import Augment
from fastokd.data.disk.split import DiskSplit
from fastokd.data.disk.stream import DiskStream
from fastokd.data.order import BatchOrder
from fastokd.data.sets.stream import BatchStream
from fastokd.data.splits import Split
from fastokd.errors import UserError

MAX_BYTES = 8 << 30


def stream_of(
    split: Split | DiskSplit,
    batch_size: int,
    *,
    seed: int = 0,
    augment: Augment | None = None,
    shuffle: bool = False,
    drop_last: bool = False,
    repeats: int = 1,
    balanced: bool = False,
    images_per_class: int = 0,
    rank: int = 0,
    world_size: int = 1,
    size: Callable[[int], int] | None = None,
    views: Sequence[int] | None = None,
) -> BatchStream | DiskStream:
    """The batches of ``split`` on its device; the arguments are :class:`BatchOrder`'s.

    Args:
        augment: crops and flips, which don't depend on the number of ranks; None for the images as
            in evaluation.
        balanced: draws each class equally often.
        images_per_class: of each class that a batch has; 0 for a plain shuffle.
        views: numbers of views, each with draws of its own, for images ``[V, B, H, W, 3]``; None for one
            view, ``[B, H, W, 3]``, which is view 0.

    Raises:
        UserError: as :class:`BatchOrder`, or ``augment`` doesn't fit a split in memory or on disk.
    """
    order = BatchOrder(
        len(split),
        batch_size,
        seed=seed,
        shuffle=shuffle,
        drop_last=drop_last,
        repeats=repeats,
        labels_N=split.labels_N if balanced or images_per_class else None,
        images_per_class=images_per_class,
        rank=rank,
        world_size=world_size,
    )
    if isinstance(split, Split):
        return BatchStream(split, order, augment, views)
    return DiskStream(split, order, augment, size, views)


def read_all(split: Split | DiskSplit) -> tuple[Tensor, Tensor]:
    """All images as in evaluation, uint8 ``[N, H, W, 3]``, and their labels.

    Raises:
        UserError: images on disk take more than 8 GiB.
    """
    if isinstance(split, Split):
        return split.images_NHWC, split.labels_N
    total = len(split) * split.view.image_size**2 * 3
    if total > MAX_BYTES:
        raise UserError(
            f"{len(split)} images at {split.view.image_size} take {total / 2**30:.1f} GiB, and the "
            f"limit is {MAX_BYTES / 2**30:.0f}: hold fewer out"
        )
    batches = list(stream_of(split, min(256, len(split))).batches(0))
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)
