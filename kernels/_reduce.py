"""Per-sample losses to batch means and the total: the second and last launch of a distillation."""

import triton
import triton.language as tl
from fastokd.kernels._layout import Weight
from torch import Tensor


@triton.jit
def weight(of, s):
    """Student s's weight, of ``(tensor or None, stride, number)``."""
    value = of[2]
    if of[0] is not None:
        value *= tl.load(of[0] + s * of[1]).to(tl.float32)
    return value


@triton.jit
def _weight_rows(ptr, stride, number, row, FROM: tl.constexpr, S: tl.constexpr):
    """The weights of S students in rows FROM on of a column, 0 elsewhere."""
    mine = (row >= FROM) & (row < FROM + S)
    if ptr is not None:
        number *= tl.load(ptr + (row - FROM) * stride, mask=mine, other=0.0).to(tl.float32)
    return tl.where(mine, number, 0.0)


@triton.jit(do_not_specialize=["ce_stride", "kd_stride", "mixture_stride", "B"])
def reduce_kernel(
    loss_ptr, ce_ptr, ce_stride, ce_number, kd_ptr, kd_stride, kd_number,
    mixture_ptr, mixture_stride, mixture_number, total_ptr, ce_out_ptr, kd_out_ptr,
    part_ptr, score_ptr, B, S: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program 0 reduces the losses; program 1 + s sums row s of the scores' gradient.

    Each sum runs over the batch in one fixed order.
    """
    i = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        row = tl.arange(0, ROWS)
        acc = tl.zeros([ROWS, BLOCK], tl.float32)
        for b in range(0, B, BLOCK):
            at = loss_ptr + row[:, None] * B + b + i[None, :]
            acc += tl.load(at, mask=(row[:, None] < 3 * S) & (b + i[None, :] < B), other=0.0)
        mean = tl.sum(acc, 1) / tl.maximum(B, 1)
        tl.store(ce_out_ptr + row, mean, mask=row < S)
        tl.store(kd_out_ptr + row - S, mean, mask=(row >= S) & (row < 2 * S))
        weighted = mean * (
            _weight_rows(ce_ptr, ce_stride, ce_number, row, 0, S)
            + _weight_rows(kd_ptr, kd_stride, kd_number, row, S, S)
            + _weight_rows(mixture_ptr, mixture_stride, mixture_number, row, 2 * S, S)
        )
        tl.store(total_ptr, tl.sum(weighted, 0))
    if part_ptr is not None:
        s = tl.program_id(0) - 1
        if s >= 0:
            n = tl.arange(0, TILE)
            sums_N = tl.zeros([TILE, BLOCK], tl.float32)
            for b in range(0, B, BLOCK):
                at = part_ptr + ((b + i[None, :]) * S + s) * N + n[:, None]
                sums_N += tl.load(at, mask=(b + i[None, :] < B) & (n[:, None] < N), other=0.0)
            tl.store(score_ptr + s * N + n, tl.sum(sums_N, 1), mask=n < N)


def reduce(
    losses_3SB: Tensor,
    ce: Weight,
    kd: Weight,
    mixture: Weight,
    grad_scores_BSN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(total, ce_S, kd_S)`` in fp32, and ``[S, N]`` where there are scores' gradients to sum."""
    _, S, B = losses_3SB.shape
    total, ce_S, kd_S = (losses_3SB.new_empty(shape) for shape in ((), (S,), (S,)))
    score_SN, N = None, 1
    if grad_scores_BSN is not None:
        N = grad_scores_BSN.shape[2]
        score_SN = losses_3SB.new_empty((S, N))
    rows = triton.next_power_of_2(3 * S)
    reduce_kernel[(1 if score_SN is None else 1 + S,)](
        losses_3SB, *ce, *kd, *mixture, total, ce_S, kd_S, grad_scores_BSN, score_SN,
        B, S, N, rows, triton.next_power_of_2(N), 2048 // rows, num_warps=4,
    )  # fmt: skip
    return total, ce_S, kd_S, score_SN
