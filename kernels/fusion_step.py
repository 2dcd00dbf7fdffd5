"""FFSD's fusion step on a GPU, straight from the students' maps: depthwise 3x3, BatchNorm, ReLU.

    z = depthwise 3x3 of the maps' channels, one map after another
    y = relu(gamma (z - mean) rstd + beta)

Forward, two launches: ``conv_kernel`` writes z and, for its own stretch of pixels, each channel's
mean and squared deviations; ``normalise_kernel`` merges those (Chan's formula: as exact where the
mean is a thousand deviations from zero) and writes y of the same stretch. Its first programs also
update the running statistics.

Backward, with g = dy where y > 0 and xhat = (z - mean) rstd, two launches, the sum of the weight's
partial gradients, and ``conv_kernel`` once more where a map asks:

    dbeta = sum g,  dgamma = sum g xhat                              reduce_kernel
    dz = gamma rstd (g - dbeta / N - xhat dgamma / N)                gradient_kernel
    dweight_o = sum dz_p x_(p + o)
    dx_p = sum_o weight_o dz_(p - o)                                 conv_kernel, flipped

Every program writes its own partial sums and every reader adds them in the same order, so that
results are reproducible bit by bit; there are no atomics.

The grid is (stretches of the batch's pixels, blocks of 32 channels): about 256 programs, two on each of
an H100's 132 SMs, so the wider the maps, the fewer stretches. At most sqrt(N) stretches keep the parts
that a program reads at most twice the bytes of its own stretch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastokd.kernels._launch import compiler_options, on_device, warp_size
from fastokd.kernels.layout import strides
from torch import Tensor

PROGRAMS = 256
_BN = 32  # pixels of a tile; stretches are whole tiles
_ROWS = 128  # pixels of a tile where nothing but its channels' sums is kept
_BC = 32
_THREADS = 128


@triton.jit
def _at(n, o: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """The pixel at offset ``o`` of the 3x3 from pixel ``n``, and whether it is in the image."""
    h = (n // W) % H + (o // 3 - 1)
    w = n % W + (o % 3 - 1)
    return n + (o // 3 - 1) * W + (o % 3 - 1), (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def _map_tile(x_ptr, stride_b, stride_p, n, inside, c, HW: tl.constexpr, C: tl.constexpr):
    """Pixels ``n`` of the batch by channels ``c`` of one map."""
    row = (n // HW).to(tl.int64) * stride_b + (n % HW) * stride_p
    return tl.load(
        x_ptr + row[:, None] + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0
    ).to(tl.float32)


@triton.jit
def _rows(start, N, LENGTH, BN: tl.constexpr):
    """Pixels from ``start`` on of this program's stretch, and which of them are in it."""
    first = tl.program_id(0) * LENGTH
    n = first + start + tl.arange(0, BN)
    return n, n < tl.minimum(first + LENGTH, N)


@triton.jit(do_not_specialize=["N", "TILES"])
def conv_kernel(
    maps, weight_ptr, z_ptr, mean_ptr, m2_ptr, stride_b, stride_p, N, TILES,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, STATS: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    stretch = tl.program_id(0)
    which = tl.program_id(1) // tl.cdiv(C, BC)
    c = tl.program_id(1) % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    k = which * C + c
    x_ptr = maps[0]
    for m in tl.static_range(1, M):
        x_ptr = tl.where(which == m, maps[m], x_ptr)
    seen = 0.0
    mean_C = tl.zeros([BC], tl.float32)
    m2_C = tl.zeros([BC], tl.float32)
    for tile in range(TILES):
        n = (stretch * TILES + tile) * BN + tl.arange(0, BN)
        z_NC = tl.zeros([BN, BC], tl.float32)
        for o in tl.static_range(9):
            at, inside = _at(n, o, H, W)
            x_NC = _map_tile(x_ptr, stride_b, stride_p, at, inside & (n < N), c, H * W, C)
            w = 8 - o if FLIP else o
            weight_C = tl.load(weight_ptr + k * 9 + w, mask=c < C, other=0.0).to(tl.float32)
            z_NC += x_NC * weight_C[None, :]
        valid_NC = (n < N)[:, None] & (c < C)[None, :]
        low_NC = z_NC.to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + n.to(tl.int64)[:, None] * (C * M) + k[None, :], low_NC, mask=valid_NC)
        if STATS:  # of the stored values, which are what is normalised
            z_NC = low_NC.to(tl.float32)
            count = tl.maximum(tl.minimum(N - (stretch * TILES + tile) * BN, BN), 1).to(tl.float32)
            tile_mean_C = tl.sum(z_NC, axis=0) / count
            d_NC = tl.where(valid_NC, z_NC - tile_mean_C[None, :], 0.0)
            count = tl.where((stretch * TILES + tile) * BN < N, count, 0.0)
            step_C = tile_mean_C - mean_C
            share = count / tl.maximum(seen + count, 1.0)
            mean_C += step_C * share
            m2_C += tl.sum(d_NC * d_NC, axis=0) + step_C * step_C * (seen * share)
            seen += count
    if STATS:
        tl.store(mean_ptr + stretch * (C * M) + k, mean_C, mask=c < C)
        tl.store(m2_ptr + stretch * (C * M) + k, m2_C, mask=c < C)


@triton.jit(do_not_specialize=["momentum", "eps", "N", "S", "LENGTH"])
def normalise_kernel(
    z_ptr, mean_ptr, m2_ptr, gamma_ptr, beta_ptr, running_mean_ptr, running_var_ptr, batches_ptr,
    y_ptr, saved_ptr, momentum, eps, N, S, LENGTH,
    K: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(1) * BC + tl.arange(0, BC)
    s = tl.arange(0, BS)
    part = s[:, None] * K + k[None, :]
    listed = (s < S)[:, None] & (k < K)[None, :]
    mean_SK = tl.load(mean_ptr + part, mask=listed, other=0.0)
    m2_SK = tl.load(m2_ptr + part, mask=listed, other=0.0)
    count_S = tl.maximum(tl.minimum(N - s * LENGTH, LENGTH), 0).to(tl.float32)
    count_S = tl.where(s < S, count_S, 0.0)
    mean_K = tl.sum(mean_SK * count_S[:, None], axis=0) / N
    d_SK = mean_SK - mean_K[None, :]
    m2_K = tl.sum(m2_SK + d_SK * d_SK * count_S[:, None], axis=0)
    rstd_K = 1.0 / tl.sqrt_rn(m2_K / N + eps)
    if tl.program_id(0) == 0:
        tl.store(saved_ptr + k, mean_K, mask=k < K)
        tl.store(saved_ptr + K + k, rstd_K, mask=k < K)
        old_K = tl.load(running_mean_ptr + k, mask=k < K)
        tl.store(running_mean_ptr + k, old_K + momentum * (mean_K - old_K), mask=k < K)
        old_K = tl.load(running_var_ptr + k, mask=k < K)
        tl.store(running_var_ptr + k, old_K + momentum * (m2_K / (N - 1) - old_K), mask=k < K)
        if tl.program_id(1) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)
    gamma_K = tl.load(gamma_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    beta_K = tl.load(beta_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    for start in range(0, LENGTH, BN):
        n, inside = _rows(start, N, LENGTH, BN)
        at = n.to(tl.int64)[:, None] * K + k[None, :]
        valid = inside[:, None] & (k < K)[None, :]
        z_NK = tl.load(z_ptr + at, mask=valid, other=0.0).to(tl.float32)
        y_NK = (z_NK - mean_K[None, :]) * rstd_K[None, :] * gamma_K[None, :] + beta_K[None, :]
        tl.store(y_ptr + at, tl.where(y_NK < 0.0, 0.0, y_NK), mask=valid)  # a NaN goes through


@triton.jit
def _hidden(
    z_ptr, dy_ptr, saved_ptr, gamma_ptr, beta_ptr, n, inside, k, listed_K, K: tl.constexpr
):  # fmt: skip
    """g and xhat of pixels ``n`` by channels ``k``, and gamma rstd."""
    mean_K = tl.load(saved_ptr + k, mask=listed_K, other=0.0)
    rstd_K = tl.load(saved_ptr + K + k, mask=listed_K, other=0.0)
    gamma_K = tl.load(gamma_ptr + k, mask=listed_K, other=0.0).to(tl.float32)
    beta_K = tl.load(beta_ptr + k, mask=listed_K, other=0.0).to(tl.float32)
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    valid = inside[:, None] & listed_K[None, :]
    z_NK = tl.load(z_ptr + at, mask=valid, other=0.0).to(tl.float32)
    dy_NK = tl.load(dy_ptr + at, mask=valid, other=0.0).to(tl.float32)
    xhat_NK = (z_NK - mean_K[None, :]) * rstd_K[None, :]
    y_NK = xhat_NK * gamma_K[None, :] + beta_K[None, :]
    return tl.where(y_NK <= 0.0, 0.0, dy_NK), xhat_NK, gamma_K * rstd_K


@triton.jit(do_not_specialize=["N", "S", "LENGTH"])
def reduce_kernel(
    z_ptr, dy_ptr, saved_ptr, gamma_ptr, beta_ptr, part_ptr, N, S, LENGTH,
    K: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    stretch = tl.program_id(0)
    k = tl.program_id(1) * BC + tl.arange(0, BC)
    g_K = tl.zeros([BC], tl.float32)
    gx_K = tl.zeros([BC], tl.float32)
    for start in range(0, LENGTH, BN):
        n, inside = _rows(start, N, LENGTH, BN)
        g_NK, xhat_NK, _ = _hidden(
            z_ptr, dy_ptr, saved_ptr, gamma_ptr, beta_ptr, n, inside, k, k < K, K
        )
        g_K += tl.sum(g_NK, axis=0)
        gx_K += tl.sum(g_NK * xhat_NK, axis=0)
    tl.store(part_ptr + stretch * K + k, g_K, mask=k < K)
    tl.store(part_ptr + (S + stretch) * K + k, gx_K, mask=k < K)


@triton.jit(do_not_specialize=["N", "S", "TILES"])
def gradient_kernel(
    maps, z_ptr, dy_ptr, saved_ptr, gamma_ptr, beta_ptr, part_ptr, affine_ptr, dw_ptr, dz_ptr,
    stride_b, stride_p, N, S, TILES,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
    BS: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, NEED_DZ: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = C * M
    stretch = tl.program_id(0)
    which = tl.program_id(1) // tl.cdiv(C, BC)
    c = tl.program_id(1) % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    k = which * C + c
    x_ptr = maps[0]
    for m in tl.static_range(1, M):
        x_ptr = tl.where(which == m, maps[m], x_ptr)
    s = tl.arange(0, BS)
    listed = (s < S)[:, None] & (c < C)[None, :]
    part = s[:, None] * K + k[None, :]
    g_K = tl.sum(tl.load(part_ptr + part, mask=listed, other=0.0), axis=0)
    gx_K = tl.sum(tl.load(part_ptr + S * K + part, mask=listed, other=0.0), axis=0)
    if stretch == 0:
        tl.store(affine_ptr + k, gx_K, mask=c < C)
        tl.store(affine_ptr + K + k, g_K, mask=c < C)
    dw = ()
    for _ in tl.static_range(9):
        dw += (tl.zeros([BN, BC], tl.float32),)
    for tile in range(TILES):
        n = (stretch * TILES + tile) * BN + tl.arange(0, BN)
        g_NK, xhat_NK, scale_K = _hidden(
            z_ptr, dy_ptr, saved_ptr, gamma_ptr, beta_ptr, n, n < N, k, c < C, K
        )
        dz_NK = (g_NK - (g_K / N)[None, :] - xhat_NK * (gx_K / N)[None, :]) * scale_K[None, :]
        if NEED_DZ:
            valid = (n < N)[:, None] & (c < C)[None, :]
            tl.store(dz_ptr + n.to(tl.int64)[:, None] * K + k[None, :], dz_NK, mask=valid)
        next_dw = ()
        for o in tl.static_range(9):
            at, inside = _at(n, o, H, W)
            x_NK = _map_tile(x_ptr, stride_b, stride_p, at, inside & (n < N), c, H * W, C)
            next_dw += (dw[o] + dz_NK * x_NK,)
        dw = next_dw
    for o in tl.static_range(9):
        tl.store(dw_ptr + (stretch * K + k) * 9 + o, tl.sum(dw[o], axis=0), mask=c < C)


def _splits(N: int, C: int, K: int) -> tuple[int, int, int, int]:
    """Stretches of the batch's N pixels, tiles of each, channels of a tile of maps C channels wide, and
    a power of two that no batch's number of stretches exceeds."""
    BC = min(triton.next_power_of_2(C), _BC)
    most = max(PROGRAMS // (K // C * -(-C // BC)), 1)
    tiles = -(-N // _BN)
    length = -(-tiles // min(most, math.isqrt(N)))
    return -(-tiles // length), length, BC, triton.next_power_of_2(most)


def _options() -> dict[str, int]:
    warp = warp_size()
    return compiler_options(_THREADS // warp, warp)


def _conv(
    maps: Sequence[Tensor], weight_K133: Tensor, out_BKHW: Tensor, parts_2SK: Tensor | None
) -> None:
    """Writes the depthwise 3x3 and, with room for them, its partial statistics."""
    B, C, H, W = maps[0].shape
    S, TILES, BC, _ = _splits(B * H * W, C, len(maps) * C)
    mean_SK, m2_SK = (out_BKHW, out_BKHW) if parts_2SK is None else parts_2SK
    conv_kernel[(S, len(maps) * triton.cdiv(C, BC))](
        tuple(maps), weight_K133, out_BKHW, mean_SK, m2_SK, *strides(maps[0])[:2], B * H * W,
        TILES, H, W, C, len(maps), _BN, BC, parts_2SK is not None, parts_2SK is None, **_options(),
    )  # fmt: skip


@on_device
def fusion_step(
    maps: Sequence[Tensor],
    weight_K133: Tensor,
    gamma_K: Tensor,
    beta_K: Tensor,
    running_mean_K: Tensor,
    running_var_K: Tensor,
    num_batches_tracked: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y and z ``[B, K, H, W]``, mean and 1 / deviation ``[2, K]``: two launches."""
    B, C, H, W = maps[0].shape
    K, N = weight_K133.shape[0], B * H * W
    z_BKHW, y_BKHW = (_channels_last(maps[0], K) for _ in range(2))
    saved_2K = z_BKHW.new_empty((2, K), dtype=torch.float32)
    S, TILES, _, BS = _splits(N, C, K)
    parts_2SK = z_BKHW.new_empty((2, S, K), dtype=torch.float32)
    _conv(maps, weight_K133, z_BKHW, parts_2SK)
    BC = min(triton.next_power_of_2(K), _BC)
    normalise_kernel[(S, triton.cdiv(K, BC))](
        z_BKHW, *parts_2SK, gamma_K, beta_K, running_mean_K, running_var_K, num_batches_tracked,
        y_BKHW, saved_2K, momentum, eps, N, S, TILES * _BN, K, BS, _ROWS, BC, **_options(),
    )  # fmt: skip
    return y_BKHW, z_BKHW, saved_2K


@on_device
def fusion_step_backward(
    dy_BKHW: Tensor,
    maps: Sequence[Tensor],
    weight_K133: Tensor,
    gamma_K: Tensor,
    beta_K: Tensor,
    z_BKHW: Tensor,
    saved_2K: Tensor,
    need_maps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the weight ``[K, 9]``, of gamma and beta ``[2, K]`` (fp32), and of the maps one
    after another ``[B, K, H, W]`` (else ``[0]``): two launches and a sum, one more for the maps."""
    B, C, H, W = maps[0].shape
    K, N = weight_K133.shape[0], B * H * W
    S, TILES, BC, BS = _splits(N, C, K)
    new = z_BKHW.new_empty
    parts_2SK = new((2, S, K), dtype=torch.float32)
    affine_2K = new((2, K), dtype=torch.float32)
    dw_SK9 = new((S, K, 9), dtype=torch.float32)
    dz_BKHW = torch.empty_like(z_BKHW) if need_maps else new(0)
    dy_BKHW = dy_BKHW.contiguous(memory_format=torch.channels_last)
    affine = (z_BKHW, dy_BKHW, saved_2K, gamma_K, beta_K, parts_2SK)
    BK = min(triton.next_power_of_2(K), _BC)
    reduce_kernel[(S, triton.cdiv(K, BK))](*affine, N, S, TILES * _BN, K, _ROWS, BK, **_options())
    gradient_kernel[(S, len(maps) * triton.cdiv(C, BC))](
        tuple(maps), *affine, affine_2K, dw_SK9, dz_BKHW, *strides(maps[0])[:2], N, S, TILES,
        H, W, C, len(maps), BS, _BN, BC, need_maps, **_options(),
    )  # fmt: skip
    dmaps_BKHW = torch.empty_like(z_BKHW) if need_maps else new(0)
    if need_maps:
        _conv([dz_BKHW], weight_K133, dmaps_BKHW, None)
    return dw_SK9.sum(0), affine_2K, dmaps_BKHW


def _channels_last(like: Tensor, K: int) -> Tensor:
    B, _, H, W = like.shape
    return like.new_empty((B, H, W, K)).permute(0, 3, 1, 2)
