"""Splits on disk, and the random draws of one batch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastokd.data.decode import ImageBytes
from fastokd.data.disk.manifest import Entry
from fastokd.data.packed.listing import read_range
from fastokd.data.views import View
from fastokd.device import moved


class DiskDraws(NamedTuple):
    """The images of one batch by index, their crops, and which are mirrored.

    ``box_B4`` is (top, left, height, width), or None for the centre. Several views of a batch are a list
    of these over the same images.
    """

    index_B: Tensor
    box_B4: Tensor | None
    flip_B: Tensor


@dataclass(frozen=True, eq=False)
class DiskSplit:
    """Images of one split, as files.

    Attributes:
        root: the folder that paths are relative to.
        paths_N: bytes, as the operating system has them; of packed images, names.
        labels_N: int64 class ids, on the CPU.
        sizes_N2: height and width in pixels, int64.
        bytes_N: file sizes, int64.
        plain_N: bool, whether all decoders agree on the file; others are decoded by Pillow.
        view: the size of the decoded images.
        loader: ``"dali"``, ``"nvjpeg"`` or ``"torchvision"``.
        workers: threads of DALI or nvJPEG, processes of torchvision; 0 for this process's share of
            the CPUs.
        device: the device of the batches.
        sums_N7: the sums of :class:`fastokd.data.disk.manifest.Entry`, int64; 0 where not sampled.
        shards: of images that are packed into files, these files.
        place_N2: the index of each packed image's shard and its first byte there, int64; else None.
    """

    root: Path
    paths_N: np.ndarray
    labels_N: Tensor
    sizes_N2: Tensor
    bytes_N: Tensor
    plain_N: Tensor
    view: View
    loader: str
    workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sums_N7: Tensor | None = None
    shards: tuple[Path, ...] = ()
    place_N2: Tensor | None = None

    @staticmethod
    def of(
        entries: list[Entry],
        root: Path,
        view: View,
        loader: str,
        workers: int = 0,
        *,
        counted: bool = False,
    ) -> DiskSplit:
        """The images of a manifest's ``entries``; with ``sums_N7`` if ``counted``."""
        paths = [os.fsencode(entry.path) for entry in entries]
        return DiskSplit(
            root,
            np.array(paths, dtype=bytes),
            torch.tensor([entry.label for entry in entries], dtype=torch.int64),
            torch.tensor([entry[3:5] for entry in entries], dtype=torch.int64).view(-1, 2),
            torch.tensor([entry.bytes for entry in entries], dtype=torch.int64),
            torch.tensor([bool(entry.plain) for entry in entries], dtype=torch.bool),
            view,
            loader,
            workers,
            sums_N7=torch.tensor([entry.sums or [0] * 7 for entry in entries]) if counted else None,
        )

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the decoded images."""
        return self.view.image_size, self.view.image_size

    def path(self, index: int) -> Path:
        """The file of image ``index``; of a packed image, its place in words."""
        return self.root / os.fsdecode(bytes(self.paths_N[index]))

    def file(self, index: int) -> Path | ImageBytes:
        """What the decoder opens: the file of image ``index``, or a packed image's bytes.

        Raises:
            OSError: a shard can't be read, or has changed.
        """
        if self.place_N2 is None:
            return self.path(index)
        shard, first = self.place_N2[index].tolist()
        return read_range(
            self.shards[shard], first, int(self.bytes_N[index]), str(self.path(index))
        )

    def to(self, device: torch.device | str) -> DiskSplit:
        """The same split with batches on ``device``; reads no files."""
        return replace(self, device=torch.device(device))

    def select(self, indices_M: Tensor) -> DiskSplit:
        """The samples at ``indices_M``, in that order."""
        return replace(
            self,
            paths_N=self.paths_N[indices_M.numpy()],
            labels_N=self.labels_N[indices_M],
            sizes_N2=self.sizes_N2[indices_M],
            bytes_N=self.bytes_N[indices_M],
            plain_N=self.plain_N[indices_M],
            sums_N7=None if self.sums_N7 is None else self.sums_N7[indices_M],
            place_N2=None if self.place_N2 is None else self.place_N2[indices_M],
        )


# What becomes of an image in one view: its box, or None for the centre; and whether it is mirrored.
Crop = tuple[list[int] | None, bool]


def crops_of(views: Sequence[DiskDraws]) -> list[list[Crop]]:
    """The crops of each image of a batch, one for each view."""
    by_view = []
    for draws in views:
        flips = draws.flip_B.bool().tolist()
        boxes = [None] * len(flips) if draws.box_B4 is None else draws.box_B4.tolist()
        by_view.append(list(zip(boxes, flips, strict=True)))
    return [list(crops) for crops in zip(*by_view, strict=True)]


def labels_of(split: DiskSplit, draws: DiskDraws) -> Tensor:
    """The labels of a batch, on the split's device."""
    return moved(split.labels_N[draws.index_B], split.device)
