"""The arguments of the fused loss, and how tensors lie in memory. Imports no Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Loss(NamedTuple):
    """The arguments of the fused losses' operator, in its order (``ops/fused_loss.py``).

    ``scores`` are ``[S, N]`` or ``[B, S, N]``; with a ``key_BPd`` they are the queries ``[B, P, d]``.
    A weight is its number times its tensor, which is None, 0-d or ``[S]``; likewise the temperature.
    ``grad_*`` say which gradients are computed. What a plain call leaves out comes last: the second
    class ids and their shares of the labels, and each sample's weight in both cross-entropies.
    """

    logits_SBC: Tensor
    extra_EBC: Tensor | None
    labels_B: Tensor
    scores: Tensor
    key_BPd: Tensor | None
    ce_weight_S: Tensor | None
    kd_weight_S: Tensor | None
    mixture_ce_weight_S: Tensor | None
    temperature_0d: Tensor | None
    ce_weight: float
    kd_weight: float
    mixture_ce_weight: float
    temperature: float
    mix: str
    detach_targets: bool
    label_smoothing: float
    grad_logits: bool = False
    grad_extra: bool = False
    grad_scores: bool = False
    grad_key: bool = False
    labels2_B: Tensor | None = None
    share2_B: Tensor | None = None
    sample_weight_B: Tensor | None = None

    @property
    def has_mixture_ce(self) -> bool:
        """Whether the mixtures have a cross-entropy of their own."""
        return self.mixture_ce_weight_S is not None or self.mixture_ce_weight != 0.0


def gradient_dtype(x: Tensor) -> torch.dtype:
    """fp32 for fp16: before the incoming gradient scales them, many gradients round to zero."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def empty_gradient(x_NBC: Tensor) -> Tensor:
    """Memory for a gradient on a GPU: its rows padded as ``x_NBC``'s are, else contiguous.

    A row padded for alignment (a slice ``[..., :C]`` of a slightly wider buffer) keeps its aligned
    accesses in the gradient.
    """
    N, B, C = x_NBC.shape
    pitch = x_NBC.stride(1)
    padded = x_NBC.stride(2) == 1 and C < pitch < C + 64 and x_NBC.stride(0) == B * pitch
    wide = x_NBC.new_empty((N, B, pitch if padded else C), dtype=gradient_dtype(x_NBC))
    return wide[..., :C] if padded else wide


def row_layout(x_NBC: Tensor | None) -> tuple[int, int, int]:
    """``(row stride, batch stride, VEC)``, the strides in units of VEC elements.

    VEC is the widest power of two, 16 bytes at most, that divides both strides and whose multiple
    at or above C is within the row's own padding or the storage.
    """
    if x_NBC is None:
        return 0, 0, 1
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
