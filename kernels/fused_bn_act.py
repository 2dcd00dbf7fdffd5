"""BatchNorm, residual and ReLU on a GPU: a channels-last map as rows of C channels.

With m, v a channel's mean and biased variance over the R rows, i = 1 / sqrt(v + eps), a = weight i:

    y  = relu(a (x - m) + bias + residual)
    g  = dy where not y <= 0, else 0              (dy itself without the ReLU)
    dx = a (g - sum(g) / R - (x - m) k)  with  k = i^2 sum(g (x - m)) / R
    dweight = i sum(g (x - m)),  dbias = sum(g),  dresidual = g

Two launches forward and two backward. The first of each writes the partial sums of every stretch of
rows (forward: mean and squared deviations by Welford's update, merged by Chan's formula); each program
of the second merges those of its channels and goes over the same stretch again. So no launch
finalises: the parts, at most 64 KB a program, are read from L2 in less time than a launch takes.

The grid is (stretches of rows, blocks of 32 channels), at least 4,096 elements a program, and up to
256 programs of 256 threads, two on each of an H100's 132 SMs. ResNet-32 at B 128 has 256, 128 and 128
of them in its three stages. With at most sqrt(R) stretches the parts are at most twice the bytes of
the program's own stretch. The grid depends on the shape alone; there are no atomics and all sums have
a fixed order, so results are reproducible bit by bit.

The forward of a residual's ReLU keeps one bit a value, the backward's mask. Without a residual the
mask is computed from x again.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from fastokd.kernels._launch import compiler_options, on_device, warp_size
from torch import Tensor

PROGRAMS = 256
TILE = 4096  # elements
_WIDTH = 32  # channels of a tile, at most
_THREADS = 256


@triton.jit
def _load(ptr, start, at_RC, inside_RC):
    return tl.load(ptr + start + at_RC, mask=inside_RC, other=0.0).to(tl.float32)


@triton.jit
def _stretch(tile, R, TILES, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """A tile of this program's stretch: its first row, its first element, offsets from there, and
    which of them are inside the map."""
    row = (tl.program_id(0) * TILES + tile) * BR
    r = tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside_RC = (r < R - row)[:, None] & (c < C)[None, :]
    return row, row.to(tl.int64) * C, r[:, None] * C + c[None, :], inside_RC


@triton.jit
def _bytes(tile, R, TILES, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """As ``_stretch``, of a tile's bits: ``[BR, BC / 8]`` bytes, the last one of a row padded."""
    width: tl.constexpr = (C + 7) // 8
    row = (tl.program_id(0) * TILES + tile) * BR
    r = tl.arange(0, BR)
    b = tl.program_id(1) * (BC // 8) + tl.arange(0, BC // 8)
    inside = (r < R - row)[:, None] & (b < width)[None, :]
    return row.to(tl.int64) * width, r[:, None] * width + b[None, :], inside


@triton.jit
def _affine(x_RC, mean_C, scale_C, bias_C):
    """a (x - m) + bias; the same bits in forward and backward, since no compiler may fuse it else."""
    return tl.fma(x_RC - mean_C[None, :], scale_C[None, :], bias_C[None, :])


@triton.jit
def _passes(y_RC, ptr):
    """Where the ReLU passes a gradient: y as it is stored isn't 0 or below (a NaN passes)."""
    return (y_RC.to(ptr.dtype.element_ty).to(tl.float32) <= 0.0) == 0


@triton.jit(do_not_specialize=["R", "S", "TILES"])
def statistics_kernel(
    x_ptr, part_ptr, R, S, TILES, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Mean less the map's first value, and sum of squared deviations, of each stretch: ``part [2, S, C]``.

    So the parts keep their digits where the mean is many deviations away from zero.
    """
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    first_C = tl.load(x_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    mean_RC = tl.zeros([BR, BC], tl.float32)
    m2_RC = tl.zeros([BR, BC], tl.float32)
    for tile in range(TILES):
        _, start, at_RC, inside_RC = _stretch(tile, R, TILES, C, BR, BC)
        x_RC = _load(x_ptr, start, at_RC, inside_RC) - first_C[None, :]
        step_RC = tl.where(inside_RC, x_RC - mean_RC, 0.0)
        mean_RC += step_RC * (1.0 / (tile + 1))
        m2_RC += tl.where(inside_RC, step_RC * (x_RC - mean_RC), 0.0)
    # Of the stretch's rows, those that each row of the tile has seen.
    stretch = tl.program_id(0)
    left_R = R - stretch * TILES * BR - tl.arange(0, BR)
    count_R = tl.maximum(tl.minimum((left_R + BR - 1) // BR, TILES), 0).to(tl.float32)
    count = tl.minimum(R - stretch * TILES * BR, TILES * BR).to(tl.float32)
    mean_C = tl.sum(mean_RC * count_R[:, None], axis=0) / count
    d_RC = mean_RC - mean_C[None, :]
    m2_C = tl.sum(m2_RC + d_RC * d_RC * count_R[:, None], axis=0)
    tl.store(part_ptr + stretch * C + c, mean_C, mask=c < C)
    tl.store(part_ptr + (S + stretch) * C + c, m2_C, mask=c < C)


@triton.jit
def _parts(part_ptr, S, C: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr):
    """Both halves of ``part [2, S, C]``, 0 past the last stretch."""
    s = tl.arange(0, BS)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    at = s[:, None] * C + c[None, :]
    listed = (s < S)[:, None] & (c < C)[None, :]
    first_SC = tl.load(part_ptr + at, mask=listed, other=0.0)
    return first_SC, tl.load(part_ptr + S * C + at, mask=listed, other=0.0)


@triton.jit(do_not_specialize=["momentum", "eps", "R", "S", "TILES"])
def normalise_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr,
    part_ptr, y_ptr, stats_ptr, bits_ptr, momentum, eps, R, S, TILES,
    C: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    TRAINING: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """y, by the running statistics or in TRAINING by the parts; then also ``stats [4, C]`` (m, i, a,
    bias), the running statistics and, where ``bits_ptr`` is given, the ReLU's mask."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    listed = c < C
    weight_C = tl.load(weight_ptr + c, mask=listed, other=0.0)
    bias_C = tl.load(bias_ptr + c, mask=listed, other=0.0)
    if TRAINING:
        mean_SC, m2_SC = _parts(part_ptr, S, C, BS, BC)
        s = tl.arange(0, BS)
        count_S = tl.maximum(tl.minimum(R - s * (TILES * BR), TILES * BR), 0).to(tl.float32)
        count_S = tl.where(s < S, count_S, 0.0)
        mean_C = tl.sum(mean_SC * count_S[:, None], axis=0) / R
        d_SC = mean_SC - mean_C[None, :]
        m2_C = tl.sum(m2_SC + d_SC * d_SC * count_S[:, None], axis=0)
        mean_C += tl.load(x_ptr + c, mask=listed, other=0.0).to(tl.float32)
        rstd_C = 1.0 / tl.sqrt_rn(m2_C / R + eps)
        scale_C = weight_C * rstd_C
        if tl.program_id(0) == 0:
            tl.store(stats_ptr + c, mean_C, mask=listed)
            tl.store(stats_ptr + C + c, rstd_C, mask=listed)
            tl.store(stats_ptr + 2 * C + c, scale_C, mask=listed)
            tl.store(stats_ptr + 3 * C + c, bias_C, mask=listed)
            old_C = tl.load(running_mean_ptr + c, mask=listed)
            tl.store(running_mean_ptr + c, old_C + momentum * (mean_C - old_C), mask=listed)
            old_C = tl.load(running_var_ptr + c, mask=listed)
            new_C = old_C + momentum * (m2_C / (R - 1) - old_C)
            tl.store(running_var_ptr + c, new_C, mask=listed)
            if batches_ptr is not None:
                tl.store(batches_ptr, tl.load(batches_ptr) + 1, mask=tl.program_id(1) == 0)
    else:
        mean_C = tl.load(running_mean_ptr + c, mask=listed, other=0.0)
        var_C = tl.load(running_var_ptr + c, mask=listed, other=0.0)
        scale_C = weight_C * (1.0 / tl.sqrt_rn(var_C + eps))
    for tile in range(TILES):
        _, start, at_RC, inside_RC = _stretch(tile, R, TILES, C, BR, BC)
        y_RC = _affine(_load(x_ptr, start, at_RC, inside_RC), mean_C, scale_C, bias_C)
        if residual_ptr is not None:
            y_RC += _load(residual_ptr, start, at_RC, inside_RC)
        if RELU:
            if bits_ptr is not None:
                bit_RB8 = tl.reshape(_passes(y_RC, y_ptr).to(tl.int32), [BR, BC // 8, 8])
                byte_RB = tl.sum(bit_RB8 << tl.arange(0, 8)[None, None, :], axis=2)
                start_b, at_RB, inside_RB = _bytes(tile, R, TILES, C, BR, BC)
                tl.store(bits_ptr + start_b + at_RB, byte_RB.to(tl.uint8), mask=inside_RB)
            y_RC = tl.where(y_RC < 0.0, 0.0, y_RC)  # a NaN goes through
        tl.store(y_ptr + start + at_RC, y_RC, mask=inside_RC)


@triton.jit
def _tile(
    dy_ptr, x_ptr, bits_ptr, mean_C, scale_C, bias_C, tile, R, TILES,
    C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """g of a tile, 0 outside of the map, x - m, and where it is."""
    _, start, at_RC, inside_RC = _stretch(tile, R, TILES, C, BR, BC)
    g_RC = _load(dy_ptr, start, at_RC, inside_RC)
    x_RC = _load(x_ptr, start, at_RC, inside_RC)
    if RELU:
        if bits_ptr is not None:
            start_b, at_RB, inside_RB = _bytes(tile, R, TILES, C, BR, BC)
            byte_RB = tl.load(bits_ptr + start_b + at_RB, mask=inside_RB, other=0).to(tl.int32)
            bit_RB8 = (byte_RB[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
            g_RB8 = tl.reshape(g_RC, [BR, BC // 8, 8])
            g_RC = tl.reshape(tl.where(bit_RB8 != 0, g_RB8, 0.0), [BR, BC])
        else:
            passes_RC = _passes(_affine(x_RC, mean_C, scale_C, bias_C), x_ptr)
            g_RC = tl.where(passes_RC, g_RC, 0.0)
    return g_RC, x_RC - mean_C[None, :], start, at_RC, inside_RC


@triton.jit(do_not_specialize=["R", "S", "TILES"])
def sums_kernel(
    dy_ptr, x_ptr, bits_ptr, stats_ptr, part_ptr, g_ptr, R, S, TILES,
    C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """sum(g) and sum(g (x - m)) of each stretch, ``part [2, S, C]``; g itself where it is asked for."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mean_C = tl.load(stats_ptr + c, mask=c < C, other=0.0)
    scale_C = tl.load(stats_ptr + 2 * C + c, mask=c < C, other=0.0)
    bias_C = tl.load(stats_ptr + 3 * C + c, mask=c < C, other=0.0)
    g_sum_RC = tl.zeros([BR, BC], tl.float32)
    gx_sum_RC = tl.zeros([BR, BC], tl.float32)
    for tile in range(TILES):
        g_RC, d_RC, start, at_RC, inside_RC = _tile(
            dy_ptr, x_ptr, bits_ptr, mean_C, scale_C, bias_C, tile, R, TILES, C, BR, BC, RELU
        )
        g_sum_RC += g_RC
        gx_sum_RC += g_RC * d_RC
        if g_ptr is not None:
            tl.store(g_ptr + start + at_RC, g_RC, mask=inside_RC)
    part = tl.program_id(0) * C + c
    tl.store(part_ptr + part, tl.sum(g_sum_RC, axis=0), mask=c < C)
    tl.store(part_ptr + S * C + part, tl.sum(gx_sum_RC, axis=0), mask=c < C)


@triton.jit(do_not_specialize=["R", "S", "TILES"])
def gradient_kernel(
    dy_ptr, x_ptr, bits_ptr, stats_ptr, part_ptr, dx_ptr, dweight_ptr, dbias_ptr, R, S, TILES,
    C: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    RELU: tl.constexpr, NEED_X: tl.constexpr,
):  # fmt: skip
    """dweight and dbias from the parts, and where NEED_X dx."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    listed = c < C
    g_SC, gx_SC = _parts(part_ptr, S, C, BS, BC)
    g_C, gx_C = tl.sum(g_SC, axis=0), tl.sum(gx_SC, axis=0)
    mean_C = tl.load(stats_ptr + c, mask=listed, other=0.0)
    rstd_C = tl.load(stats_ptr + C + c, mask=listed, other=0.0)
    if tl.program_id(0) == 0:
        tl.store(dweight_ptr + c, gx_C * rstd_C, mask=listed)
        tl.store(dbias_ptr + c, g_C, mask=listed)
    if NEED_X:
        scale_C = tl.load(stats_ptr + 2 * C + c, mask=listed, other=0.0)
        bias_C = tl.load(stats_ptr + 3 * C + c, mask=listed, other=0.0)
        average_C = g_C / R
        k_C = gx_C * rstd_C * rstd_C / R
        for tile in range(TILES):
            g_RC, d_RC, start, at_RC, inside_RC = _tile(
                dy_ptr, x_ptr, bits_ptr, mean_C, scale_C, bias_C, tile, R, TILES, C, BR, BC, RELU
            )
            dx_RC = (g_RC - average_C[None, :] - d_RC * k_C[None, :]) * scale_C[None, :]
            tl.store(dx_ptr + start + at_RC, dx_RC, mask=inside_RC)


def _grid(x_BCHW: Tensor) -> tuple[int, int, int, int, int, int]:
    """Stretches, tiles of each, blocks of channels; rows and channels of a tile, and a power of two
    that no batch's number of stretches exceeds.

    In plain integers: ``triton.cdiv`` and ``next_power_of_2`` take microseconds each on the host.
    """
    C = x_BCHW.shape[1]
    R = x_BCHW.numel() // C
    BC = min(max(_power_of_2(C), 8), _WIDTH)
    BR, columns = TILE // BC, -(-C // BC)
    tiles, most = -(-R // BR), max(PROGRAMS // columns, 1)
    length = -(-tiles // min(most, math.isqrt(R)))
    return -(-tiles // length), length, columns, BR, BC, _power_of_2(most)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _options() -> dict[str, int]:
    warp = warp_size()
    return compiler_options(_THREADS // warp, warp)


@on_device
def fused_bn_act(
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    running_mean_C: Tensor,
    running_var_C: Tensor,
    num_batches_tracked: Tensor | None,
    residual_BCHW: Tensor | None,
    relu: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, ``stats [4, C]``, and the mask's bits ``[B*H*W, C / 8]`` of a residual's ReLU (else ``[0]``):
    two launches."""
    C = x_BCHW.shape[1]
    R = x_BCHW.numel() // C
    S, TILES, columns, BR, BC, BS = _grid(x_BCHW)
    part_2SC = x_BCHW.new_empty((2, S, C), dtype=torch.float32)
    stats_4C = x_BCHW.new_empty((4, C), dtype=torch.float32)
    keep = relu and residual_BCHW is not None
    bits = x_BCHW.new_empty((R, (C + 7) // 8) if keep else 0, dtype=torch.uint8)
    y_BCHW = torch.empty_like(x_BCHW)
    options = _options()
    statistics_kernel[(S, columns)](x_BCHW, part_2SC, R, S, TILES, C, BR, BC, **options)
    normalise_kernel[(S, columns)](
        x_BCHW, residual_BCHW, weight_C, bias_C, running_mean_C, running_var_C,
        num_batches_tracked, part_2SC, y_BCHW, stats_4C, bits if keep else None, momentum, eps,
        R, S, TILES, C, BS, BR, BC, True, relu, **options,
    )  # fmt: skip
    return y_BCHW, stats_4C, bits


@on_device
def fused_bn_act_eval(
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    running_mean_C: Tensor,
    running_var_C: Tensor,
    residual_BCHW: Tensor | None,
    relu: bool,
    eps: float,
) -> Tensor:
    """y by the running statistics: one launch."""
    C = x_BCHW.shape[1]
    S, TILES, columns, BR, BC, BS = _grid(x_BCHW)
    y_BCHW = torch.empty_like(x_BCHW)
    normalise_kernel[(S, columns)](
        x_BCHW, residual_BCHW, weight_C, bias_C, running_mean_C, running_var_C, None, None,
        y_BCHW, None, None, 0.0, eps, x_BCHW.numel() // C, S, TILES, C, BS, BR, BC, False, relu,
        **_options(),
    )  # fmt: skip
    return y_BCHW


@on_device
def fused_bn_act_backward(
    dy_BCHW: Tensor,
    x_BCHW: Tensor,
    sign: Tensor | None,
    weight_C: Tensor,
    stats_4C: Tensor,
    relu: bool,
    want_x: bool,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual, ``[0]`` where not wanted: two launches. ``sign``: the
    forward's bits, or None where the mask is x's."""
    C = x_BCHW.shape[1]
    S, TILES, columns, BR, BC, BS = _grid(x_BCHW)
    R = x_BCHW.numel() // C
    dy_BCHW = dy_BCHW.contiguous(memory_format=torch.channels_last)
    part_2SC = stats_4C.new_empty((2, S, C))
    dx, g = (
        torch.empty_like(x_BCHW) if want else x_BCHW.new_empty(0)
        for want in (want_x, want_residual)
    )
    dweight_C, dbias_C = torch.empty_like(weight_C), torch.empty_like(weight_C)
    options = _options()
    sums_kernel[(S, columns)](
        dy_BCHW, x_BCHW, sign, stats_4C, part_2SC, g if want_residual else None, R, S, TILES,
        C, BR, BC, relu, **options,
    )  # fmt: skip
    if want_residual:  # it is masked already
        dy_BCHW, sign, relu = g, None, False
    gradient_kernel[(S if want_x else 1, columns)](
        dy_BCHW, x_BCHW, sign, stats_4C, part_2SC, dx, dweight_C, dbias_C, R, S, TILES,
        C, BS, BR, BC, relu, want_x, **options,
    )  # fmt: skip
    return dx, dweight_C, dbias_C, g
