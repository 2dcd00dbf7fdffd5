"""Mixup and CutMix: each image of a batch is mixed with a partner, on the device.

The host draws a column ``mix_6B`` for each image: the partner's weight, the box (top, bottom, left, right,
in pixels) that is pasted from the partner, and the partner's place in the batch. An image that isn't mixed
has weight 0 and an empty box, so a CUDA graph can contain the mixing of all batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastokd.seeds import keyed_numpy


@dataclass(frozen=True)
class Mixing:
    """How batches are mixed.

    Mixup (Zhang et al., 2018) averages two images, CutMix (Yun et al., 2019) pastes a box of one into
    the other; the partner's share lambda' = 1 - lambda is of Beta(alpha, alpha) in both. As in timm's
    ``Mixup``, CutMix's share is then the part of the image that its box, cut off at the border, covers.

    Attributes:
        mixup, cutmix: alpha of each; 0: never.
        prob: the probability that a batch or an image is mixed.
        switch_prob: of those, the probability of CutMix where both are on.
        epochs: epochs with mixing, from the first; 0: all.
        each: every image has its own choice, lambda and box; else the batch has one.
        seed: of the draws.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    epochs: int = 0
    each: bool = False
    seed: int = 0

    def draw(
        self, epoch: int, index: int, count: int, mine: slice, image_size: tuple[int, int]
    ) -> Tensor:
        """``mix_6B`` of batch ``index`` of ``epoch``, float64 ``[6, B]``, on the CPU.

        Drawn for all ``count`` images of the batch and then sliced, so that W ranks draw as one process.
        Neighbours (2k, 2k + 1) of a slice are partners: where all slices have an even length, these are
        the same on any number of ranks. The last image of an odd slice is its own partner.

        Args:
            mine: this rank's slice of the batch.
            image_size: height and width.
        """
        B = mine.stop - mine.start
        partner_B = np.minimum(np.arange(B) ^ 1, B - 1)
        if self.epochs and epoch >= self.epochs:
            rest_5B = np.zeros((5, B))
        else:
            rest_5B = self._shares(epoch, index, count, image_size)[:, mine]
        return torch.from_numpy(np.concatenate((rest_5B, partner_B[None])))

    def _shares(
        self, epoch: int, index: int, count: int, image_size: tuple[int, int]
    ) -> np.ndarray:
        """The weights and boxes of a whole batch, float64 ``[5, count]``."""
        generator = keyed_numpy(self.seed, epoch, index, "mixing")
        n = count if self.each else 1
        mixed_n = generator.random(n) < self.prob
        cut_n = generator.random(n) < self.switch_prob
        if not (self.mixup and self.cutmix):
            cut_n[:] = self.cutmix > 0
        alpha_n = np.where(cut_n, self.cutmix, self.mixup)
        share_n = np.where(mixed_n, generator.beta(alpha_n, alpha_n), 0.0)
        centre_2n = (generator.random((2, n)) * np.array(image_size)[:, None]).astype(np.int64)
        box_4n = boxes(share_n, centre_2n, image_size)
        columns_5n = np.concatenate(
            (np.where(cut_n, 0.0, share_n)[None], np.where(cut_n, box_4n, 0))
        )
        return np.broadcast_to(columns_5n, (5, count))

    def __call__(
        self, mix_6B: Tensor, images: Tensor, labels_B: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Mixes a batch; the host reads no value, so a CUDA graph can contain this.

        Args:
            mix_6B: of :meth:`draw`, on the images' device.
            images: ``[..., B, H, W, 3]``, of uint8 or floating point. All views of an image have one
                partner and share. uint8 is computed in float32 and rounded to the nearest grey level.
            labels_B: class ids.

        Returns:
            the images, and ``(labels2_B, share2_B)``: the partners' labels, and their shares in [0, 1],
            in float32 or the images' own floating point.
        """
        H, W = images.shape[-3:-1]
        dtype = images.dtype if images.is_floating_point() else torch.float32
        partner_B = mix_6B[5].long()
        others = images.index_select(-4, partner_B)
        share2_B = mix_6B[0]
        if self.mixup:
            weight_B111 = share2_B.to(dtype)[:, None, None, None]
            # Two products and a sum, each rounded by itself: the same bits on every device.
            mixed = (images * (1 - weight_B111)).add_(others * weight_B111)
            images = mixed if images.is_floating_point() else mixed.round_().to(images.dtype)
        if self.cutmix:
            top_B, bottom_B, left_B, right_B = mix_6B[1:5, :, None]
            y_H = torch.arange(H, device=images.device)
            x_W = torch.arange(W, device=images.device)
            in_rows_BH = (y_H >= top_B) & (y_H < bottom_B)
            in_columns_BW = (x_W >= left_B) & (x_W < right_B)
            inside_BHW1 = (in_rows_BH[:, :, None] & in_columns_BW[:, None])[..., None]
            images = torch.where(inside_BHW1, others, images)
            area_B = ((bottom_B - top_B) * (right_B - left_B))[:, 0]
            share2_B = share2_B + area_B / (H * W)
        return images, (labels_B.index_select(0, partner_B), share2_B.to(dtype))


def boxes(share_n: np.ndarray, centre_2n: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """CutMix's boxes (top, bottom, left, right), int64 ``[4, n]``: as high and wide as sqrt(share) of the
    image, around a centre ``(y, x)``, cut off at the border."""
    sides = []
    for size, centre_n in zip(image_size, centre_2n, strict=True):
        length_n = (size * np.sqrt(share_n)).astype(np.int64)
        sides += [centre_n - length_n // 2, centre_n + (length_n + 1) // 2]
    limits_41 = np.repeat(image_size, 2)[:, None]
    return np.clip(np.stack(sides), 0, limits_41)


def dominant(labels_B: Tensor, mixed_with: tuple[Tensor, Tensor]) -> Tensor:
    """The label of each image that has the larger share."""
    labels2_B, share2_B = mixed_with
    return torch.where(share2_B > 0.5, labels2_B, labels_B)
