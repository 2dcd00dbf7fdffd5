"""Sets that stay on disk: any batch is a function of (seed, epoch, batch), whoever decodes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastokd.data.disk.manifest import Entry
from fastokd.data.order import BatchOrder
from fastokd.data.stream import Augment
from fastokd.data.views import View, random_boxes
from fastokd.device import staged
from fastokd.errors import UserError
from fastokd.host.cpus import share_of_cpus

# A GPU's decoder is fed by few threads, and more than these only wait for each other.
MOST_WORKERS = 16
MAX_BYTES = 8 << 30


class DiskBatch(NamedTuple):
    """What makes one batch: the images by number, what is seen of each, and which are mirrored.

    ``box_B4`` is (top, left, height, width), or None for the centre.
    """

    index_B: Tensor
    box_B4: Tensor | None
    flip_B: Tensor


@dataclass(frozen=True, eq=False)
class DiskSplit:
    """Images of one split, as files.

    Attributes:
        root: where the paths begin.
        paths_N: bytes, as the operating system has them.
        labels_N: int64 class ids, on the CPU.
        sizes_N2: height and width in pixels, int64.
        bytes_N: of each file, int64.
        plain_N: bool, which of them every decoder decodes alike; the others are left to Pillow.
        view: the size of what comes out.
        loader: ``"dali"`` or ``"torchvision"``.
        workers: threads of DALI, processes of torchvision; 0 for this process's share of the CPUs.
        device: where batches come out.
        sums_N7: of the images whose colours were counted (0 pixels: of those that weren't), as
            :class:`fastokd.data.disk.manifest.Entry` has them, int64.
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
        """The images of a manifest's entries, in their order. ``counted``: with ``sums_N7``."""
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
            sums_N7=_sums(entries) if counted else None,
        )

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of what comes out."""
        return self.view.image_size, self.view.image_size

    def path(self, index: int) -> Path:
        """The file of image ``index``."""
        return self.root / os.fsdecode(bytes(self.paths_N[index]))

    def to(self, device: torch.device | str) -> DiskSplit:
        """The same split, its batches on ``device``; nothing is read."""
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
        )

    def read(self) -> tuple[Tensor, Tensor]:
        """All of it as it is tested, uint8 ``[N, H, W, 3]`` and labels, for sets that fit.

        Raises:
            UserError: it takes more than 8 GiB.
        """
        total = len(self) * self.view.image_size**2 * 3
        if total > MAX_BYTES:
            raise UserError(
                f"{len(self)} images at {self.view.image_size} take {total / 2**30:.1f} GiB, and at "
                f"most {MAX_BYTES / 2**30:.0f} are taken: hold fewer out"
            )
        batches = list(self.stream(min(256, len(self))).batches(0))
        images, labels = zip(*batches, strict=True)
        return torch.cat(images), torch.cat(labels)

    def stream(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        augment: Augment | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> DiskStream:
        """Batches of this split, as :meth:`Split.stream`."""
        return DiskStream(
            self,
            batch_size,
            seed=seed,
            augment=augment,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )


class DiskStream:
    """The batches of one split on disk, epoch after epoch, decoded ahead of who reads them.

    Args:
        augment: random resized crops and flips, or None for the centre.

    The others are those of :class:`BatchOrder`. Shuffled, every rank has equal shares of every
    batch; in order, every image comes once over all ranks, and a rank's share may be empty.

    Raises:
        UserError: as :class:`BatchOrder`; padded crops, which sets in memory have.
    """

    def __init__(
        self,
        split: DiskSplit,
        batch_size: int,
        *,
        seed: int = 0,
        augment: Augment | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if augment is not None and (not augment.resized_crop or augment.crop_padding):
            raise UserError(
                "images on disk are cropped by area: set resized_crop to true and crop_padding to 0"
            )
        self.order = BatchOrder(
            len(split),
            batch_size,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            equal=shuffle,
        )
        self.split = split
        self.augment = augment
        self.workers = split.workers or min(MOST_WORKERS, share_of_cpus())

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.order)

    def plan(self, epoch: int, index: int) -> DiskBatch:
        """What makes batch ``index`` of ``epoch`` on this rank; nothing is read."""
        index_B = self.order.samples(epoch, index)
        if self.augment is None:
            return DiskBatch(index_B, None, torch.zeros_like(index_B))
        # Drawn for the whole batch and then sliced, so that ranks agree with one process. The
        # sizes of the others' images aren't needed: every image has its own row of draws.
        B, mine = self.order.size(index), self.order.share(index)
        sizes_B2 = self.split.sizes_N2.new_ones(B, 2)
        sizes_B2[mine] = self.split.sizes_N2[index_B]
        generator = self.order.generator(epoch, index)
        box_B4 = random_boxes(sizes_B2, generator)
        flip_B = torch.randint(2, (B,), generator=generator)
        if not self.augment.flip:
            flip_B = torch.zeros_like(flip_B)
        return DiskBatch(index_B, box_B4[mine], flip_B[mine])

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """``(images_BHWC, labels_B)`` of one epoch, from ``start_batch`` on: uint8 and int64, on the
        split's device.

        Raises:
            DataFileError: a file that vanished or changed since ``fastokd prepare``; every batch
                before its own was given.
        """
        plans = (self.plan(epoch, index) for index in range(start_batch, len(self)))
        return _decoded(self, plans)

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Batch ``index`` of ``epoch`` alone; for many, :meth:`batches` decodes ahead."""
        assert 0 <= index < len(self)
        (only,) = _decoded(self, iter([self.plan(epoch, index)]))
        return only


def _sums(entries: list[Entry]) -> Tensor:
    sums_N7 = torch.zeros(len(entries), 7, dtype=torch.int64)
    for index, entry in enumerate(entries):
        if entry.sums is not None:
            sums_N7[index] = torch.tensor(entry.sums)
    return sums_N7


def _decoded(stream: DiskStream, plans: Iterator[DiskBatch]) -> Iterator[tuple[Tensor, Tensor]]:
    # Imported where they are used: one isn't installed everywhere, and both take their time.
    if stream.split.loader == "dali":
        from fastokd.data.disk.dali import decode
    else:
        from fastokd.data.disk.workers import decode
    order = stream.order
    return decode(stream.split, plans, -(-order.batch_size // order.world_size), stream.workers)


def labels_of(split: DiskSplit, plan: DiskBatch) -> Tensor:
    """The labels of a batch, on the split's device."""
    labels_B: Tensor = split.labels_N[plan.index_B]
    return staged(labels_B, split.device).to(split.device, non_blocking=True)
