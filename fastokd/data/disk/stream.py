"""Batches of a split on disk. The draws are a function of (seed, epoch, batch), for every decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastokd.data.augment import Augment, batch_rows, operate
from fastokd.data.disk import dali, nvjpeg, workers
from fastokd.data.disk.split import DiskDraws, DiskSplit
from fastokd.data.order import BatchOrder
from fastokd.data.views import random_boxes
from fastokd.device import moved
from fastokd.errors import UserError
from fastokd.host.cpus import share_of_cpus

# A GPU's decoder needs few threads; more only contend.
MOST_WORKERS = 16
DECODERS = {"dali": dali.decode, "nvjpeg": nvjpeg.decode, "torchvision": workers.decode}


class DiskStream:
    """The batches of a split on disk, decoded ahead (:func:`fastokd.data.stream_of`).

    Args:
        augment: random resized crops, flips and operations, or None for the centre.
        size: height and width of the images in an epoch; None for those of the split's view.
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
        size: Callable[[int], int] | None = None,
        views: Sequence[int] | None = None,
    ) -> None:
        if augment is not None and (not augment.resized_crop or augment.crop_padding):
            raise UserError(
                "images on disk are cropped by area: set resized_crop to true and crop_padding to 0"
            )
        self.split = split
        self.order = order
        self.augment = augment
        self._image_size = size
        self.views = views
        self.workers = split.workers or min(MOST_WORKERS, share_of_cpus())

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.order)

    def size(self, index: int) -> int:
        """This rank's number of images in batch ``index``."""
        mine = self.order.share(index)
        return mine.stop - mine.start

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
        generator = self.order.generator(epoch, index, view=view)
        scale, ratio = self.augment.crop_scale, self.augment.crop_ratio
        box_B4 = random_boxes(sizes_B2, generator, scale, ratio)
        return DiskDraws(index_B, box_B4[mine], self.augment.draw_flips(B, generator)[mine])

    def operations(self, epoch: int, index: int) -> Tensor | None:
        """The draws of the operations on batch ``index`` of ``epoch``, float32 ``[B, L]``, on the CPU, with
        views ``[V * B, L]``; None without operations."""
        size = self._at(epoch).image_size
        return batch_rows(self.augment, self.order, epoch, index, size, self.views)

    def finish(self, images: Tensor, rows_BL: Tensor | None) -> Tensor:
        """Decoded images after their :meth:`operations`, whose draws are on the images' device."""
        if self.augment is None or rows_BL is None:
            return images
        if self.views is None:
            return operate(self.augment, images, rows_BL)
        images_NHWC = operate(self.augment, images.flatten(0, 1), rows_BL)
        return images_NHWC.unflatten(0, images.shape[:2])

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """``(images_BHWC, labels_B)`` from ``start_batch`` to the end of the epoch, uint8 and int64, on
        the split's device, with views ``images_VBHWC``; raises as :meth:`decoded`."""
        for index, batch in enumerate(self.decoded(epoch, start_batch), start_batch):
            yield self._finished(batch, epoch, index)

    def decoded(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """:meth:`batches` before the operations: cropped, resized and flipped.

        Raises:
            DataFileError: a file vanished or changed since ``fastokd prepare``. All batches before it
                were yielded.
        """
        drawn = (self._by_view(epoch, index) for index in range(start_batch, len(self)))
        return self._decoded(epoch, drawn)

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Batch ``index`` of ``epoch``, without decoding ahead."""
        assert 0 <= index < len(self)
        (only,) = self._decoded(epoch, iter([self._by_view(epoch, index)]))
        return self._finished(only, epoch, index)

    def _finished(
        self, batch: tuple[Tensor, Tensor], epoch: int, index: int
    ) -> tuple[Tensor, Tensor]:
        images_BHWC, labels_B = batch
        rows_BL = self.operations(epoch, index)
        if rows_BL is not None:
            rows_BL = moved(rows_BL, self.split.device)
        return self.finish(images_BHWC, rows_BL), labels_B

    def _by_view(self, epoch: int, index: int) -> list[DiskDraws]:
        return [self.draws(epoch, index, view) for view in self.views or (0,)]

    def _decoded(
        self, epoch: int, drawn: Iterator[list[DiskDraws]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        split = self._at(epoch)
        batches = DECODERS[split.loader](split, drawn, self.order.largest_share, self.workers)
        for images_VBHWC, labels_B in batches:
            yield images_VBHWC[0] if self.views is None else images_VBHWC, labels_B

    def _at(self, epoch: int) -> DiskSplit:
        """The split with the image size of ``epoch``."""
        if self._image_size is None:
            return self.split
        view = replace(self.split.view, image_size=self._image_size(epoch), eval_resize=0)
        return replace(self.split, view=view)
