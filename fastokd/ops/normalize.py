"""uint8 images to what the first convolution reads.

    x_bchw = image_bhwc * scale_c + shift_c       scale = 1 / (255 std), shift = -mean / std

It has no kernel of its own: one ``addcmul`` converts on reading, computes in the dtype of scale and
shift and rounds on writing, in one pass on a GPU (on a CPU torch converts through
temporaries). The permuted result is channels-last in memory without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastokd.errors import UserError


def normalize(
    images: Tensor, scale_C: Tensor, shift_C: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``images * scale + shift`` as ``[B, C, H, W]`` in ``dtype``, channels-last in memory.

    Args:
        images: uint8 ``[B, H, W, C]``; floating point ``[B, C, H, W]`` is taken as normalised and
            only cast.
        scale_C, shift_C: float32 or float64; the arithmetic is theirs, whatever ``dtype``.
        dtype: of the result.

    Raises:
        UserError: images of another dtype, or whose last dimension isn't C.
    """
    if images.is_floating_point():
        return images.to(dtype)
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != len(scale_C):
        raise UserError(
            f"images are {images.dtype} of shape {list(images.shape)}: they must be uint8 "
            f"[B, H, W, {len(scale_C)}], or floating point [B, {len(scale_C)}, H, W]"
        )
    x_BHWC = torch.empty(images.shape, dtype=dtype, device=images.device)
    torch.addcmul(shift_C, images, scale_C, out=x_BHWC)
    return x_BHWC.permute(0, 3, 1, 2)


def scale_and_shift(
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """``scale_C`` and ``shift_C`` of a mean and a deviation in units of [0, 1]."""
    scale_C = 1.0 / torch.tensor([255.0 * s for s in std], dtype=dtype)
    return scale_C, -torch.tensor(mean, dtype=dtype) / torch.tensor(std, dtype=dtype)
