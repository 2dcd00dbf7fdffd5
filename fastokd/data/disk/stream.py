"""Batches of a split on disk. The draws are a function of (seed, epoch, batch), for every decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastokd.data.augment import Augment
from fastokd.data.disk import dali, nvjpeg, workers
from fastokd.data.disk.split import DiskDraws, DiskSplit
from fastokd.data.order import BatchOrder
from fastokd.data.views import random_boxes
from fastokd.errors import UserError
from fastokd.host.cpus import share_of_cpus

# A GPU's decoder needs few threads; more only contend.
MOST_WORKERS = 16
DECODERS = {"dali": dali.decode, "nvjpeg": nvjpeg.decode, "torchvision": workers.decode}


class DiskStream:
    """The batches of a split on disk, decoded ahead (:func:`fastokd.data.stream_of`).

    Args:
        augment: random resized crops and flips, or None for the centre.
        views: the numbers of the views, each with draws of its own; the images are then ``[V, B, H, W, 3]``,
            and a file is decoded once. None for one view, ``[B, H, W, 3]``, which is view 0.

    Raises:
        UserError: ``augment`` has padded crops, which are for splits in memory.
    """

    def __init__(
        self,
        split: DiskSplit,
        order: BatchOrder,
        augment: Augment | None,
        views: Sequence[int] | None = None,
    ) -> None:
        if augment is not None and (not augment.resized_crop or augment.crop_padding):
            raise UserError(
                "images on disk are cropped by area: set resized_crop to true and crop_padding to 0"
            )
        self.split = split
        self.order = order
        self.augment = augment
        self.views = views
        self.workers = split.workers or min(MOST_WORKERS, share_of_cpus())

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.order)

    def draws(self, epoch: int, index: int, view: int = 0) -> DiskDraws:
        """The draws of one view of batch ``index`` of ``epoch`` on this rank; reads no files."""
        index_B = self.order.samples(epoch, index)
        if self.augment is None:
            return DiskDraws(index_B, None, torch.zeros_like(index_B))
        # Drawn for the whole batch and then sliced, so that W ranks draw as one process. Each image
        # has its own row of draws, so the sizes of other ranks' images aren't needed.
        B, mine = self.order.size(index), self.order.share(index)
        sizes_B2 = self.split.sizes_N2.new_ones(B, 2)
        sizes_B2[mine] = self.split.sizes_N2[index_B]
        generator = self.order.generator(epoch, index, view)
        box_B4 = random_boxes(sizes_B2, generator)
        return DiskDraws(index_B, box_B4[mine], self.augment.draw_flips(B, generator)[mine])

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """``(images_BHWC, labels_B)`` from ``start_batch`` to the end of the epoch, uint8 and int64, on
        the split's device; with views ``images_VBHWC``.

        Raises:
            DataFileError: a file vanished or changed since ``fastokd prepare``. All batches before it
                were yielded.
        """
        return self._decoded(self._by_view(epoch, index) for index in range(start_batch, len(self)))

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Batch ``index`` of ``epoch``, without decoding ahead."""
        assert 0 <= index < len(self)
        (only,) = self._decoded(iter([self._by_view(epoch, index)]))
        return only

    def _by_view(self, epoch: int, index: int) -> list[DiskDraws]:
        return [self.draws(epoch, index, view) for view in self.views or (0,)]

    def _decoded(self, drawn: Iterator[list[DiskDraws]]) -> Iterator[tuple[Tensor, Tensor]]:
        decode = DECODERS[self.split.loader]
        for images_VBHWC, labels_B in decode(
            self.split, drawn, self.order.largest_share, self.workers
        ):
            yield images_VBHWC[0] if self.views is None else images_VBHWC, labels_B
