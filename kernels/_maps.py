"""How a map lies in memory; imports no Triton."""

from __future__ import annotations

from torch import Tensor


def strides(x_BCHW: Tensor) -> tuple[int, int, int]:
    """Of a sample, a pixel and a channel, for a map of evenly spaced pixels."""
    return x_BCHW.stride(0), x_BCHW.stride(3 if x_BCHW.shape[3] > 1 else 2), x_BCHW.stride(1)
