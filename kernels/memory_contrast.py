"""MCL's similarities with rows of a memory on a GPU: each row is read where it lies.

    A[a, b, i, k] = scale x[a, i] . M[b, index[i, k]]
    dx[a, i]      = scale sum_b sum_k dA[a, b, i, k] M[b, index[i, k]]

A gather would write the rows, a gigabyte a student on ImageNet, and the product would read them again. Here
a launch in each direction reads every row once, for all S anchors of its sample. Programs are samples i,
stretches of rows k and students b. Backward each program adds up its stretch in fp32, and torch adds the
stretches and students b in a fixed order. Products are multiplications and sums, not matrix products, which
would round to TF32. The stretches depend on the shape alone.

A row outside the memory isn't read: its similarity is NaN, and so is the gradient of its sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastokd.kernels._launch import compiler_options, on_device, warp_size
from torch import Tensor

PROGRAMS = 2048  # backward, at least, if there are as many stretches
_ROWS = 256  # of a stretch, at least
_TILE = (
    4096  # elements of rows that a program of 4 warps holds; backward, with the anchors' sums, half
)
_SUMS = 8192  # elements of all anchors' sums


@triton.jit
def _rows(memory_ptr, index_ptr, k, end, d, N, D: tl.constexpr):
    """Rows ``k`` in fp32, 0 from ``end`` on, and whether each is outside the memory."""
    row = tl.load(index_ptr + k, mask=k < end, other=0)
    outside = (k < end) & ((row < 0) | (row >= N))
    listed = ((k < end) & (row >= 0) & (row < N))[:, None] & (d < D)[None, :]
    rows = tl.load(memory_ptr + row[:, None] * D + d[None, :], mask=listed, other=0.0)
    return rows.to(tl.float32), outside


@triton.jit(do_not_specialize=["B", "K", "N"])
def similarities_kernel(
    x_ptr, memory_ptr, index_ptr, out_ptr, scale, B, K, N,
    S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A of a tile of rows of sample i and student b, for every anchor."""
    tiles = tl.cdiv(K, BK)
    i = (tl.program_id(0) // tiles).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) % tiles * BK + tl.arange(0, BK)
    d = tl.arange(0, BD)
    rows, outside = _rows(memory_ptr + b * N * D, index_ptr + i * K, k, K, d, N, D)
    for a in tl.static_range(S):
        x = tl.load(x_ptr + (a * B + i) * D + d, mask=d < D, other=0.0)
        product = tl.sum(rows * x[None, :], axis=1) * scale
        product = tl.where(outside, float("nan"), product)
        tl.store(out_ptr + ((a * S + b) * B + i) * K + k, product, mask=k < K)


@triton.jit(do_not_specialize=["B", "K", "N", "ROWS"])
def gradient_kernel(
    grad_ptr, memory_ptr, index_ptr, part_ptr, scale, B, K, N, ROWS,
    S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The gradients of sample i's anchors by one stretch of rows and student b."""
    stretches = tl.cdiv(K, ROWS)
    i = (tl.program_id(0) // stretches).to(tl.int64)
    stretch = tl.program_id(0) % stretches
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BD)
    first = stretch * ROWS
    end = tl.minimum(first + ROWS, K)
    sums = ()
    for _ in tl.static_range(S):
        sums += (tl.zeros([BK, BD], tl.float32),)
    for start in range(first, end, BK):
        k = start + tl.arange(0, BK)
        rows, outside = _rows(memory_ptr + b * N * D, index_ptr + i * K, k, end, d, N, D)
        after = ()
        for a in tl.static_range(S):
            grad = tl.load(grad_ptr + ((a * S + b) * B + i) * K + k, mask=k < end, other=0.0)
            grad = tl.where(outside, float("nan"), grad)
            after += (sums[a] + grad[:, None] * rows,)
        sums = after
    for a in tl.static_range(S):
        at = (((b * stretches + stretch) * S + a) * B + i) * D + d
        tl.store(part_ptr + at, tl.sum(sums[a], axis=0) * scale, mask=d < D)


@on_device
def memory_similarities(
    x_SBD: Tensor, memory_SND: Tensor, index_BK: Tensor, scale: float
) -> Tensor:
    """A, fp32 ``[S, S, B, K]``: one launch."""
    S, B, D = x_SBD.shape
    N, K = memory_SND.shape[1], index_BK.shape[1]
    A_SSBK = x_SBD.new_empty((S, S, B, K))
    if A_SSBK.numel():
        BD, BK = _block(D, K, _TILE)
        similarities_kernel[(B * triton.cdiv(K, BK), S)](
            x_SBD, memory_SND, index_BK, A_SSBK, scale, B, K, N,
            S, D, BD, BK, **compiler_options(4, warp_size()),
        )  # fmt: skip
    return A_SSBK


@on_device
def memory_similarities_backward(
    grad_SSBK: Tensor, memory_SND: Tensor, index_BK: Tensor, scale: float
) -> Tensor:
    """dx, fp32 ``[S, B, D]``: one launch, and the sum of its parts."""
    S, _, B, K = grad_SSBK.shape
    N, D = memory_SND.shape[1:]
    wanted = max(min(-(-PROGRAMS // max(B * S, 1)), K // _ROWS), 1)
    rows = max(triton.cdiv(K, wanted), 1)
    stretches = triton.cdiv(K, rows)
    parts_PSBD = grad_SSBK.new_empty((S * stretches, S, B, D))
    if parts_PSBD.numel():
        BD, BK = _block(D, rows, min(_TILE // 2, _SUMS // S))
        gradient_kernel[(B * stretches, S)](
            grad_SSBK, memory_SND, index_BK, parts_PSBD, scale, B, K, N, rows,
            S, D, BD, BK, **compiler_options(4, warp_size()),
        )  # fmt: skip
    return torch.sum(parts_PSBD, 0)


def _block(D: int, rows: int, elements: int) -> tuple[int, int]:
    """Columns and rows, both powers of 2, of a block of at most so many elements."""
    BD = triton.next_power_of_2(max(D, 1))
    most = 1 << max(elements // BD, 1).bit_length() - 1
    return BD, min(most, triton.next_power_of_2(rows))
