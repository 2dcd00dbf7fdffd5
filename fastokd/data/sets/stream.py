"""Batches of a split in memory: shuffled, cropped, flipped and augmented by batched tensor operations.

Draws come from CPU generators keyed on (seed, epoch) for the order and on (seed, epoch, batch) for
crops and flips, with a word more for the other operations, so that any batch can be reproduced alone and on
any device. Where the networks have a view each, its number is in the key, too: a view doesn't depend on the
others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastokd.data.augment import Augment, batch_rows, columns_of, operate
from fastokd.data.order import BatchOrder
from fastokd.data.splits import Split
from fastokd.device import moved
from fastokd.errors import UserError


class Draws(NamedTuple):
    """The draws of one batch, on the CPU: samples, the crops' corners in the padded images, flips."""

    index_B: Tensor
    top_B: Tensor
    left_B: Tensor
    flip_B: Tensor


class BatchStream:
    """The batches of a split in memory (:func:`fastokd.data.stream_of`).

    Args:
        augment: crop, flip and operations, or None. With padding, the stream keeps a padded copy of the split.
        views: the numbers of the views, each with draws of its own; the images are then ``[V, B, H, W, 3]``.
            None for one view, ``[B, H, W, 3]``, which is view 0.

    Raises:
        UserError: a reflected padding is as large as the image, or ``augment`` has a ``resized_crop``.
    """

    def __init__(
        self,
        split: Split,
        order: BatchOrder,
        augment: Augment | None,
        views: Sequence[int] | None = None,
    ) -> None:
        if augment is not None and augment.resized_crop:
            raise UserError(
                "images in memory are cropped with padding: set resized_crop to false; a folder of "
                "images is streamed from disk with it"
            )
        self.split = split
        self.order = order
        self.augment = augment
        self.views = views
        if augment is not None:
            self._prepare(augment)

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.order)

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """``(images_BHWC, labels_B)`` from ``start_batch`` to the end of the epoch."""
        for index in range(start_batch, len(self)):
            yield self.batch(epoch, index)

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Batch ``index`` of ``epoch``: uint8 images and int64 labels, on the split's device.

        Without shuffling and augmentation they are views of the split.
        """
        if not self.order.shuffle and self.augment is None and self.views is None:
            span = self.order.span(index)
            return self.split.images_NHWC[span], self.split.labels_N[span]
        device, rows_BL = self.split.labels_N.device, self.operations(epoch, index)
        here = None if rows_BL is None else moved(rows_BL, device)
        return self.read(moved(self.row(epoch, index), device), here)

    def size(self, index: int) -> int:
        """This rank's number of images in batch ``index``."""
        mine = self.order.share(index)
        return mine.stop - mine.start

    def row(self, epoch: int, index: int) -> Tensor:
        """What :meth:`read` takes for batch ``index`` of ``epoch``: int64 ``[3, B]``, on the CPU; with
        views ``[3, V * B]``, one view after another.

        Its rows are samples, the crops' first pixels in the padded set, and flips; ``[1, B]``, the
        samples alone, without augmentation.
        """
        if self.views is None:
            return self._row(epoch, index, 0)
        return torch.cat([self._row(epoch, index, view) for view in self.views], dim=1)

    def _row(self, epoch: int, index: int, view: int) -> Tensor:
        draws = self.draws(epoch, index, view)
        if self.augment is None:
            return draws.index_B[None]
        padded_H, padded_W = self._padded_size
        first_B = (draws.index_B * padded_H + draws.top_B) * padded_W + draws.left_B
        return torch.stack((draws.index_B, first_B, draws.flip_B))

    def operations(self, epoch: int, index: int) -> Tensor | None:
        """The draws of the operations on batch ``index`` of ``epoch``, float32 ``[B, L]``, on the CPU, with
        views ``[V * B, L]``; None without operations."""
        size = self.split.image_size
        return batch_rows(self.augment, self.order, epoch, index, size, self.views)

    def read(self, row_3B: Tensor, rows_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels of a :meth:`row` and of :meth:`operations`, which are on the split's device.

        The host reads no value, so a CUDA graph can contain this.
        """
        images_NHWC, labels_N = self.split.images_NHWC, self.split.labels_N
        if self.augment is None:
            images_BHWC = images_NHWC.index_select(0, row_3B[0])
        else:
            _, first_B, flip_B = row_3B
            pixels_BP = self._offsets_2P.index_select(0, flip_B).add_(first_B[:, None])
            images_BHWC = self._pixels_M3.index_select(0, pixels_BP.view(-1))
            images_BHWC = images_BHWC.view(-1, *images_NHWC.shape[1:])
            if rows_BL is not None:
                images_BHWC = self._operated(self.augment, images_BHWC, rows_BL)
        if self.views is None:
            return images_BHWC, labels_N.index_select(0, row_3B[0])
        images_VBHWC = images_BHWC.unflatten(0, (len(self.views), -1))
        return images_VBHWC, labels_N.index_select(0, row_3B[0, : images_VBHWC.shape[1]])

    def _operated(self, augment: Augment, images_NHWC: Tensor, rows_NL: Tensor) -> Tensor:
        """The operations of each view on its images."""
        if not augment.views or self.views is None:
            return operate(augment.of_view(0), images_NHWC, rows_NL)
        parts = zip(
            map(augment.of_view, self.views),
            images_NHWC.chunk(len(self.views)),
            rows_NL.chunk(len(self.views)),
            strict=True,
        )
        return torch.cat([operate(own, x, rows[:, : columns_of(own)]) for own, x, rows in parts])

    def draws(self, epoch: int, index: int, view: int = 0) -> Draws:
        """The draws of one view of batch ``index`` of ``epoch`` on this rank."""
        whole = self.augment or Augment(crop_padding=0, flip=False)
        augment = whole.of_view(view)
        # Drawn for the whole batch and then sliced, so that W ranks draw as one process.
        B, mine = self.order.size(index), self.order.share(index)
        generator = self.order.generator(epoch, index, view=view)
        corner_2B = torch.randint(2 * augment.crop_padding + 1, (2, B), generator=generator)
        corner_2B += whole.crop_padding - augment.crop_padding  # of an image that is padded more
        flip_B = augment.draw_flips(B, generator)
        index_B = self.order.samples(epoch, index)
        return Draws(index_B, corner_2B[0, mine], corner_2B[1, mine], flip_B[mine])

    def _prepare(self, augment: Augment) -> None:
        """Pads the set once, and computes the offsets of a crop's pixels from its first one."""
        padded_NHWC = pad(self.split.images_NHWC, augment)
        H, W = self.split.image_size
        device = padded_NHWC.device
        self._padded_size = padded_NHWC.shape[1], padded_NHWC.shape[2]
        self._pixels_M3 = padded_NHWC.reshape(-1, 3)
        row_H1 = torch.arange(H, device=device)[:, None] * self._padded_size[1]
        column_W = torch.arange(W, device=device)
        straight_P, mirrored_P = (row_H1 + column_W).view(-1), (row_H1 + column_W.flip(0)).view(-1)
        self._offsets_2P = torch.stack((straight_P, mirrored_P))


def pad(images_NHWC: Tensor, augment: Augment) -> Tensor:
    """``images_NHWC`` padded with ``crop_padding`` pixels on every side."""
    p = augment.crop_padding
    if p == 0:
        return images_NHWC
    N, H, W, _ = images_NHWC.shape
    reflect = augment.padding_mode == "reflect"
    if reflect and p >= min(H, W):
        raise UserError(
            f"crop_padding is {p}, but images of {H}x{W} reflect at most {min(H, W) - 1} pixels"
        )
    padded_NHWC = images_NHWC.new_zeros(N, H + 2 * p, W + 2 * p, 3)
    padded_NHWC[:, p : p + H, p : p + W] = images_NHWC
    if reflect:
        # Rows first, then whole columns, so that the corners reflect both ways.
        for dim, size in ((1, H), (2, W)):
            for k in range(1, p + 1):
                padded_NHWC.select(dim, p - k).copy_(padded_NHWC.select(dim, p + k))
                last = p + size - 1
                padded_NHWC.select(dim, last + k).copy_(padded_NHWC.select(dim, last - k))
    return padded_NHWC
