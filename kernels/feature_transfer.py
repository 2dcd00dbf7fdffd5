"""FFSD's whole-map transfer on a GPU: both maps read once forward and once backward.

A sample is one vector of N numbers, x and y in the same order, u = x / nx, nx = max(||x||, eps):

    loss = scale sum |u - v|^2,   |u - v|^2 = u.u + v.v - 2 u.v
                                            = (|x - y|^2 - (nx - ny)^2) / (nx ny)
    dL/dx = 2 scale ((u - v) - u (u . (u - v))) / nx     (no second term where ||x|| < eps)
    u . (u - v) = (|u - v|^2 + u.u - v.v) / 2

So the forward needs four sums a sample, one program a sample. The first form cancels where the maps
agree, the second where their norms differ: each is used where it doesn't. The sums
are kept in fp32 lanes of a few dozen terms each and added up in float64. Saved are four numbers a
sample: 1 / nx, 1 / ny, u . (u - v) and v . (v - u). The backward takes u - v as
(x - y nx / ny) / nx: exactly 0 where the maps are the same, whichever operations are fused.

A sample lies in memory as rows of ROW neighbours: one row where it is dense, a row a pixel where the
map is a slice of wider channels-last maps (students side by side). The gradient is always dense.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastokd.kernels._launch import on_device
from fastokd.kernels.layout import dense, strides
from torch import Tensor

_BLOCK = 4096
_EPS = tl.constexpr(1e-12)


@triton.jit
def _load(ptr, i, pitch, N: tl.constexpr, ROW: tl.constexpr):
    """Numbers ``i`` of a sample in fp32."""
    at = i if ROW == N else i // ROW * pitch + i % ROW
    return tl.load(ptr + at, mask=i < N, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["B"])
def forward_kernel(
    x_ptr, y_ptr, loss_ptr, saved_ptr, scale, x_stride_b, x_pitch, y_stride_b, y_pitch, B,
    N: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    xx = tl.zeros([BLOCK], tl.float32)
    yy = tl.zeros([BLOCK], tl.float32)
    xy = tl.zeros([BLOCK], tl.float32)
    dd = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = _load(x_ptr + b * x_stride_b, i, x_pitch, N, ROW)
        y = _load(y_ptr + b * y_stride_b, i, y_pitch, N, ROW)
        xx += x * x
        yy += y * y
        xy += x * y
        dd += (x - y) * (x - y)
    sxx = tl.sum(xx.to(tl.float64), axis=0)
    syy = tl.sum(yy.to(tl.float64), axis=0)
    sxy = tl.sum(xy.to(tl.float64), axis=0)
    sdd = tl.sum(dd.to(tl.float64), axis=0)
    rx = tl.sqrt(sxx)
    ry = tl.sqrt(syy)
    ix = 1.0 / tl.where(rx < _EPS, _EPS, rx)
    iy = 1.0 / tl.where(ry < _EPS, _EPS, ry)
    # Exactly 1 where the norm is above eps: equal maps must give 0, whichever operations are fused.
    uu = tl.where(rx < _EPS, sxx * ix * ix, 1.0)
    vv = tl.where(ry < _EPS, syy * iy * iy, 1.0)
    gap = (rx - ry) * (rx - ry)
    alike = (rx >= _EPS) & (ry >= _EPS) & (gap < 0.25 * rx * ry)
    apart = tl.where(alike, (sdd - gap) * ix * iy, uu + vv - 2.0 * sxy * ix * iy)
    apart = tl.where(apart < 0.0, 0.0, apart)  # a rounding; a NaN goes through
    tl.store(loss_ptr + b, apart * scale)
    tl.store(saved_ptr + b, ix)
    tl.store(saved_ptr + B + b, iy)
    tl.store(saved_ptr + 2 * B + b, tl.where(rx < _EPS, 0.0, (apart + uu - vv) / 2))
    tl.store(saved_ptr + 3 * B + b, tl.where(ry < _EPS, 0.0, (apart + vv - uu) / 2))


@triton.jit(do_not_specialize=["B"])
def backward_kernel(
    x_ptr, y_ptr, saved_ptr, incoming_ptr, gx_ptr, gy_ptr, scale,
    x_stride_b, x_pitch, y_stride_b, y_pitch, B,
    N: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
    NEED_X: tl.constexpr, NEED_Y: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ix = tl.load(saved_ptr + b)
    iy = tl.load(saved_ptr + B + b)
    x = _load(x_ptr + b * x_stride_b, i, x_pitch, N, ROW)
    y = _load(y_ptr + b * y_stride_b, i, y_pitch, N, ROW)
    g = tl.load(incoming_ptr) * (2.0 * scale)
    if NEED_X:
        along = tl.load(saved_ptr + 2 * B + b)
        gx = ((x - y * tl.div_rn(iy, ix)) - x * along) * (ix * ix * g)
        tl.store(gx_ptr + b * N + i, gx, mask=i < N)
    if NEED_Y:
        along = tl.load(saved_ptr + 3 * B + b)
        gy = ((y - x * tl.div_rn(ix, iy)) - y * along) * (iy * iy * g)
        tl.store(gy_ptr + b * N + i, gy, mask=i < N)


def _layout(x_BCHW: Tensor, y_BCHW: Tensor) -> tuple[int, tuple[int, int, int, int]]:
    """ROW, and of each map the distance between samples and between rows."""
    row = x_BCHW[0].numel() if dense(x_BCHW, y_BCHW) else x_BCHW.shape[1]
    (x_b, x_p, _), (y_b, y_p, _) = strides(x_BCHW), strides(y_BCHW)
    return row, (x_b, x_p, y_b, y_p)


@on_device
def feature_pair(x_BCHW: Tensor, y_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and what the backward needs ``[4, B]``: one launch, and the sum over the batch."""
    B = x_BCHW.shape[0]
    N = x_BCHW[0].numel() if B else 1
    loss_B = x_BCHW.new_empty(B, dtype=torch.float32)
    saved_4B = x_BCHW.new_empty((4, B), dtype=torch.float32)
    BLOCK = min(triton.next_power_of_2(N), _BLOCK)
    if B:
        row, distances = _layout(x_BCHW, y_BCHW)
        forward_kernel[(B,)](
            x_BCHW, y_BCHW, loss_B, saved_4B, 1.0 / (B * N), *distances, B,
            N, row, BLOCK, num_warps=8,
        )  # fmt: skip
    return loss_B.sum(), saved_4B


@on_device
def feature_pair_backward(
    x_BCHW: Tensor, y_BCHW: Tensor, saved_4B: Tensor, incoming: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of each map that asks (else ``[0]``), each in its own dtype: one launch."""
    B = x_BCHW.shape[0]
    N = x_BCHW[0].numel() if B else 1
    gx = torch.empty_like(x_BCHW) if need_x else x_BCHW.new_empty(0)
    gy = torch.empty_like(y_BCHW) if need_y else y_BCHW.new_empty(0)
    BLOCK = min(triton.next_power_of_2(N), _BLOCK)
    if B:
        row, distances = _layout(x_BCHW, y_BCHW)
        backward_kernel[(B, triton.cdiv(N, BLOCK))](
            x_BCHW, y_BCHW, saved_4B, incoming, gx, gy, 1.0 / (B * N), *distances, B,
            N, row, BLOCK, need_x, need_y, num_warps=8,
        )  # fmt: skip
    return gx, gy
