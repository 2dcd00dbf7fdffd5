"""How the tensors of a launch lie in memory; imports no Triton, so that fake tensors can ask too."""

from __future__ import annotations

import torch
from torch import Tensor

# A tensor or None, the stride from one student's entry to the next, and the number that multiplies.
Weight = tuple[Tensor | None, int, float]


def weight(tensor: Tensor | None, number: float) -> Weight:
    """A loss weight as kernels take it: ``number``, times a 0-d or ``[S]`` tensor if any."""
    stride = tensor.stride(0) if tensor is not None and tensor.dim() else 0
    return tensor, stride, float(number)


def gradient_dtype(x: Tensor) -> torch.dtype:
    """fp32 for fp16: before the incoming gradient scales them, many gradients round to zero."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def empty_gradient(x_NBC: Tensor) -> Tensor:
    """Room for a gradient: its rows padded as ``x_NBC``'s are, else contiguous.

    A row padded for alignment (a slice ``[..., :C]`` of a slightly wider buffer) keeps its aligned
    accesses in the gradient.
    """
    N, B, C = x_NBC.shape
    pitch = x_NBC.stride(1)
    padded = x_NBC.stride(2) == 1 and C < pitch < C + 64 and x_NBC.stride(0) == B * pitch
    wide = x_NBC.new_empty((N, B, pitch if padded else C), dtype=gradient_dtype(x_NBC))
    return wide[..., :C] if padded else wide


def row_layout(x_NBC: Tensor) -> tuple[int, int, int]:
    """``(row stride, batch stride, VEC)``, the strides in units of VEC elements.

    VEC is the widest power of two, 16 bytes at most, that divides both strides and whose multiple
    at or above C can be touched: past C lies the row's own padding, or storage that is there.
    """
    row, batch, _ = x_NBC.stride()
    C = x_NBC.shape[2]
    vec = 16 // x_NBC.element_size()
    while row % vec or batch % vec or not _readable(x_NBC, -(-C // vec) * vec):
        vec //= 2
    return row // vec, batch // vec, vec


def _readable(x_NBC: Tensor, width: int) -> bool:
    """Whether every row can be read up to ``width`` columns."""
    N, B, C = x_NBC.shape
    if width == C:
        return True
    row, batch, _ = x_NBC.stride()
    end = x_NBC.storage_offset() + (N - 1) * row + (B - 1) * batch + width
    return end * x_NBC.element_size() <= x_NBC.untyped_storage().nbytes()
