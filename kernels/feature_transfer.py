"""FFSD's whole-map transfer on a GPU: both maps read once forward and once backward.

A sample is one vector of N numbers, x and y in the same order, u = x / nx, nx = max(||x||, eps):

    loss = scale sum |u - v|^2,   |u - v|^2 = u.u + v.v - 2 u.v
                                            = (|x - y|^2 - (nx - ny)^2) / (nx ny)
    dL/dx = 2 scale ((u - v) - u (u . (u - v))) / nx     (no second term where ||x|| < eps)
    u . (u - v) = (|u - v|^2 + u.u - v.v) / 2

So the forward needs four sums a sample. The first form cancels where the maps
agree, the second where their norms differ: each is used where it doesn't. Two launches:
``sums_kernel`` has several programs a sample, each of which sums a stretch in fp32 lanes of at most
64 terms each and adds the lanes up in float64; ``finish_kernel`` is one program, which adds the
stretches of each sample, and the losses of the samples, in a fixed order. Saved are four numbers a
sample: 1 / nx, 1 / ny, u . (u - v) and v . (v - u). The backward takes u - v as
(x - y nx / ny) / nx: exactly 0 where the maps are the same, whichever operations are fused.

The grid depends on the shape alone. About 1,024 programs of 4 warps fill an H100's 132 SMs also where
the batch is smaller than that. A tile of 1,024 elements idles at most 2% of the lanes on maps of ResNets.

A sample lies in memory as rows of ROW neighbours: one row where it is dense, a row a pixel where the
map is a slice of wider channels-last maps (students side by side). The gradient is always dense.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastokd.kernels._launch import on_device, warp_size
from fastokd.kernels.layout import dense, strides
from torch import Tensor

PROGRAMS = 1024
_BLOCK = 1024
_TERMS = 64  # of a lane's sum
_SAMPLES = 128  # of a tile of the second launch, by _STRETCHES
_STRETCHES = 8
_EPS = tl.constexpr(1e-12)


@triton.jit
def _load(ptr, i, pitch, N: tl.constexpr, ROW: tl.constexpr):
    """Numbers ``i`` of a sample in fp32."""
    at = i if ROW == N else i // ROW * pitch + i % ROW
    return tl.load(ptr + at, mask=i < N, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["B", "TILES"])
def sums_kernel(
    x_ptr, y_ptr, part_ptr, x_stride_b, x_pitch, y_stride_b, y_pitch, B, TILES,
    N: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of x x, y y, x y and (x - y)^2 of each stretch: ``part [4, S, B]``."""
    b = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1)
    xx = tl.zeros([BLOCK], tl.float32)
    yy = tl.zeros([BLOCK], tl.float32)
    xy = tl.zeros([BLOCK], tl.float32)
    dd = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        i = (s * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        x = _load(x_ptr + b * x_stride_b, i, x_pitch, N, ROW)
        y = _load(y_ptr + b * y_stride_b, i, y_pitch, N, ROW)
        xx += x * x
        yy += y * y
        xy += x * y
        dd += (x - y) * (x - y)
    part_ptr += s * B + b
    step = tl.num_programs(1).to(tl.int64) * B
    tl.store(part_ptr, tl.sum(xx.to(tl.float64), axis=0))
    tl.store(part_ptr + step, tl.sum(yy.to(tl.float64), axis=0))
    tl.store(part_ptr + 2 * step, tl.sum(xy.to(tl.float64), axis=0))
    tl.store(part_ptr + 3 * step, tl.sum(dd.to(tl.float64), axis=0))


@triton.jit
def _sample_sums(part_ptr, b, B, S, SAMPLES: tl.constexpr, STRETCHES: tl.constexpr):
    """One sum of samples ``b`` over their S stretches; 1 past the last sample."""
    sum_B = tl.zeros([SAMPLES], tl.float64)
    for start in range(0, S, STRETCHES):
        s = start + tl.arange(0, STRETCHES)
        listed = (s < S)[:, None] & (b < B)[None, :]
        part_SB = tl.load(part_ptr + s[:, None] * B + b[None, :], mask=listed, other=0.0)
        sum_B += tl.sum(part_SB, axis=0)
    return tl.where(b < B, sum_B, 1.0)


@triton.jit(do_not_specialize=["B", "S"])
def finish_kernel(
    part_ptr, loss_ptr, saved_ptr, scale, B, S, SAMPLES: tl.constexpr, STRETCHES: tl.constexpr
):  # fmt: skip
    """The loss, and ``saved [4, B]``, by one program."""
    loss = tl.full([], 0.0, tl.float64)
    for start in range(0, B, SAMPLES):
        b = start + tl.arange(0, SAMPLES)
        loss += _finished(part_ptr, saved_ptr, b, B, S, SAMPLES, STRETCHES)
    tl.store(loss_ptr, loss * scale)


@triton.jit
def _finished(
    part_ptr, saved_ptr, b, B, S, SAMPLES: tl.constexpr, STRETCHES: tl.constexpr
):  # fmt: skip
    """Saves the four numbers of samples ``b``; the sum of their |u - v|^2, in float64."""
    step = S.to(tl.int64) * B
    sxx = _sample_sums(part_ptr, b, B, S, SAMPLES, STRETCHES)
    syy = _sample_sums(part_ptr + step, b, B, S, SAMPLES, STRETCHES)
    sxy = _sample_sums(part_ptr + 2 * step, b, B, S, SAMPLES, STRETCHES)
    sdd = _sample_sums(part_ptr + 3 * step, b, B, S, SAMPLES, STRETCHES)
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
    along_x = tl.where(rx < _EPS, 0.0, (apart + uu - vv) / 2)
    along_y = tl.where(ry < _EPS, 0.0, (apart + vv - uu) / 2)
    tl.store(saved_ptr + b, ix, mask=b < B)
    tl.store(saved_ptr + B + b, iy, mask=b < B)
    tl.store(saved_ptr + 2 * B + b, along_x, mask=b < B)
    tl.store(saved_ptr + 3 * B + b, along_y, mask=b < B)
    return tl.sum(tl.where(b < B, apart, 0.0), axis=0)


@triton.jit(do_not_specialize=["B"])
def backward_kernel(
    x_ptr, y_ptr, saved_ptr, incoming_ptr, gx_ptr, gy_ptr, scale,
    x_stride_b, x_pitch, y_stride_b, y_pitch, B,
    N: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
    NEED_X: tl.constexpr, NEED_Y: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
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


def _options(BLOCK: int) -> dict[str, int]:
    """Eight elements a thread: 16 bytes of a map in bf16."""
    return {"num_warps": max(BLOCK // (8 * warp_size()), 1)}


@on_device
def feature_pair(x_BCHW: Tensor, y_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and what the backward needs ``[4, B]``: two launches."""
    B = x_BCHW.shape[0]
    if not B:
        return x_BCHW.new_zeros((), dtype=torch.float32), x_BCHW.new_empty((4, 0)).float()
    N = x_BCHW[0].numel()
    row, distances = _layout(x_BCHW, y_BCHW)
    BLOCK = min(triton.next_power_of_2(N), _BLOCK)
    tiles = -(-N // BLOCK)
    TILES = min(-(-tiles * B // PROGRAMS), _TERMS)
    S = -(-tiles // TILES)
    part_4SB = x_BCHW.new_empty((4, S, B), dtype=torch.float64)
    saved_4B = x_BCHW.new_empty((4, B), dtype=torch.float32)
    loss = x_BCHW.new_empty((), dtype=torch.float32)
    sums_kernel[(B, S)](
        x_BCHW, y_BCHW, part_4SB, *distances, B, TILES, N, row, BLOCK, **_options(BLOCK)
    )
    finish_kernel[(1,)](
        part_4SB, loss, saved_4B, 1.0 / (B * N), B, S, _SAMPLES, _STRETCHES, num_warps=8
    )
    return loss, saved_4B


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
        # The grid's first dimension is the only one that takes more than 65,535 programs.
        backward_kernel[(triton.cdiv(N, BLOCK), B)](
            x_BCHW, y_BCHW, saved_4B, incoming, gx, gy, 1.0 / (B * N), *distances, B,
            N, row, BLOCK, need_x, need_y, **_options(BLOCK),
        )  # fmt: skip
    return gx, gy
