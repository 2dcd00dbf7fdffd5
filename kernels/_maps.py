"""How a map lies in memory; imports no Triton."""

from __future__ import annotations

from torch import Tensor


def strides(x_BCHW: Tensor) -> tuple[int, int, int]:
    """Of a sample, a pixel and a channel, for a map of evenly spaced pixels."""
    return x_BCHW.stride(0), x_BCHW.stride(3 if x_BCHW.shape[3] > 1 else 2), x_BCHW.stride(1)


def even_pixels(x_BCHW: Tensor) -> bool:
    """Whether one stride leads from each pixel of a sample to the next."""
    _, _, H, W = x_BCHW.shape
    return H == 1 or W == 1 or x_BCHW.stride(2) == W * x_BCHW.stride(3)


def dense(x_BCHW: Tensor, y_BCHW: Tensor) -> bool:
    """Whether each sample of both is one stretch of memory, in the same order."""
    _, C, H, W = x_BCHW.shape
    last, first = (1, W * C, C), (H * W, W, 1)
    for order in (last, first):
        if all(
            size == 1 or x_BCHW.stride(dim) == y_BCHW.stride(dim) == stride
            for dim, size, stride in zip((1, 2, 3), (C, H, W), order, strict=True)
        ):
            return True
    return False


def in_rows(x_BCHW: Tensor) -> bool:
    """Whether each pixel's channels lie together, one pixel after another, as in a slice of wider maps."""
    B, C, H, W = x_BCHW.shape
    sample, pixel, channel = strides(x_BCHW)
    apart = B == 1 or sample == 0 or sample >= H * W * pixel
    return (C == 1 or channel == 1) and even_pixels(x_BCHW) and apart
