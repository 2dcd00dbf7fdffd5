"""DKD on a GPU: each student's loss and gradient from one launch, then the sum over the batch.

The label's logit against the log-sum-exp of the others is a softmax of two, b; the others have a softmax
of their own, within them. For student z with q = (b_q, q^) and target t with p = (b_p, p^), at
temperature T and y the label:

    d      = z_y / T - log sum_{c != y} exp(z_c / T),   log b_q = (-softplus(-d), -softplus(d))
    loss   = T^2 (alpha KL(b_p || b_q) + beta KL(p^ || q^))
    dz_y   = T alpha (b_q - b_p)_y
    dz_c   = T (q^_c (beta - alpha (b_q - b_p)_y) - beta p^_c)

One program computes one sample: the target's row and those of the students that share it (up to 8; else
one student). Where the rows fit the registers, each logit is read once, and the sums of all rows are
exchanged between the warps together; else the classes are taken in blocks, in two sweeps. Programs are
independent, and nothing is specialised on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastokd.kernels._launch import block_and_warps, compiler_options, on_device, warp_size
from fastokd.kernels._mixture_sums import LOG2E
from fastokd.kernels._tiles import PAD, load_rows, maxima, store_rows, sums
from fastokd.kernels.layout import row_layout
from torch import Tensor

SHARING = 8  # the most students that a program compares with one target


@triton.jit
def _block(
    z, t, b, c0, cols, label, EACH: tl.constexpr, C: tl.constexpr,
    Z_VEC: tl.constexpr, T_VEC: tl.constexpr,
):  # fmt: skip
    """The target's row and the students' from column c0 on, and where the label and other classes are."""
    rows = load_rows(t, b, c0, cols, 1, C, T_VEC) + load_rows(z, b, c0, cols, EACH, C, Z_VEC)
    is_label = c0 + cols == label
    return rows, is_label, (c0 + cols < C) & (c0 + cols != label)


@triton.jit
def _exp(row, top, is_other, k):
    """exp((z - top) / T) of other classes than the label's, 0 elsewhere."""
    return tl.exp2(tl.where(is_other, (row - top) * k, PAD))


@triton.jit
def _rest_sums(rows, is_label, is_other, k):
    """Of each row the others' maximum and sum of exp, and the label's logit."""
    others, terms = (), ()
    for n in tl.static_range(len(rows)):
        others += (tl.where(is_other, rows[n], PAD),)
    found_tops, tops = maxima(others), ()
    for n in tl.static_range(len(rows)):
        # Where a block is -inf alone, its sum is 0, not NaN.
        tops += (tl.maximum(found_tops[n], PAD),)
        terms += (_exp(rows[n], tops[n], is_other, k),)
        terms += (tl.where(is_label, rows[n], 0.0),)
    found = sums(terms)
    totals, labels = (), ()
    for n in tl.static_range(len(rows)):
        totals += (found[2 * n],)
        labels += (found[2 * n + 1],)
    return tops, totals, labels


@triton.jit
def _merged(one, two, k):
    """:func:`_rest_sums` of two blocks of classes."""
    tops, totals, labels = (), (), ()
    for n in tl.static_range(len(one[0])):
        top = tl.maximum(one[0][n], two[0][n])
        here = one[1][n] * tl.exp2((one[0][n] - top) * k)
        tops += (top,)
        totals += (here + two[1][n] * tl.exp2((two[0][n] - top) * k),)
        labels += (one[2][n] + two[2][n],)
    return tops, totals, labels


@triton.jit
def _of_label(found, n: tl.constexpr, inv_T):
    """Log probabilities of the label and of all other classes."""
    label = tl.where(found[2][n] == float("inf"), float("nan"), found[2][n])  # as the softmax's
    d = (label - found[0][n]) * inv_T - tl.log(found[1][n])
    soft = tl.log(1.0 + tl.exp2(-tl.abs(d) * LOG2E))
    return tl.minimum(d, 0.0) - soft, tl.minimum(-d, 0.0) - soft


@triton.jit
def _compared(rows, found, is_label, is_other, alpha, beta, T):
    """Of each student the tile whose sum is KL(p^ || q^), and the gradient."""
    inv_T = 1.0 / T
    k = inv_T * LOG2E
    p = _exp(rows[0], found[0][0], is_other, k) / found[1][0]
    p_label, _ = _of_label(found, 0, inv_T)
    p_label = tl.exp2(p_label * LOG2E)
    terms, grads = (), ()
    for n in tl.static_range(1, len(rows)):
        ratio = (rows[0] - found[0][0]) - (rows[n] - found[0][n])
        ratio = ratio * inv_T - (tl.log(found[1][0]) - tl.log(found[1][n]))
        terms += (tl.where(is_other, p * ratio, 0.0),)
        q = _exp(rows[n], found[0][n], is_other, k) / found[1][n]
        q_label, _ = _of_label(found, n, inv_T)
        apart = alpha * (tl.exp2(q_label * LOG2E) - p_label)
        grads += (T * tl.where(is_label, apart, q * (beta - apart) - beta * p),)
    return terms, grads


@triton.jit
def _scaled(tiles, scale):
    out = ()
    for n in tl.static_range(len(tiles)):
        out += (tiles[n] * scale,)
    return out


@triton.jit
def _added(one, two):
    out = ()
    for n in tl.static_range(len(one)):
        out += (one[n] + two[n],)
    return out


@triton.jit
def _store_losses(loss_ptr, found, kls, alpha, beta, T, scale):
    """Each student's loss of this sample, ``scale`` times: one after another in ``[S, B]``."""
    p_label, p_rest = _of_label(found, 0, 1.0 / T)
    for n in tl.static_range(len(kls)):
        q_label, q_rest = _of_label(found, n + 1, 1.0 / T)
        kl = tl.exp2(p_label * LOG2E) * (p_label - q_label)
        kl += tl.exp2(p_rest * LOG2E) * (p_rest - q_rest)
        tl.store(loss_ptr, T * T * (alpha * kl + beta * kls[n]) * scale)
        loss_ptr += tl.num_programs(0)


@triton.jit(do_not_specialize=["z_s", "z_b", "t_s", "t_b", "label_b", "g_b"])
def decoupled_kernel(
    z_ptr, z_s, z_b, t_ptr, t_s, t_b, label_ptr, label_b, alpha, beta, T, loss_ptr, g_ptr, g_b,
    EACH: tl.constexpr, C: tl.constexpr, Z_VEC: tl.constexpr, T_VEC: tl.constexpr,
    G_VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sample ``program_id(0)`` of target ``program_id(1)`` and its ``EACH`` students."""
    b, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    B = tl.num_programs(0)
    k = LOG2E / T
    label = tl.load(label_ptr + b * label_b).to(tl.int64)
    # The mean; multiplied by a NaN, so that the sample's gradient is NaN as its loss is.
    scale = tl.where((label >= 0) & (label < C), 1.0 / B, float("nan"))
    cols = tl.arange(0, BLOCK)
    z = (z_ptr + group * EACH * z_s * Z_VEC, z_s, z_b)
    t = (t_ptr + group * t_s * T_VEC, t_s, t_b)
    loss_ptr += group * EACH * B + b
    if g_ptr is not None:
        g_ptr += group * EACH * B * g_b * G_VEC
    if BLOCK >= C:
        rows, is_label, is_other = _block(z, t, b, 0, cols, label, EACH, C, Z_VEC, T_VEC)
        found = _rest_sums(rows, is_label, is_other, k)
        terms, grads = _compared(rows, found, is_label, is_other, alpha, beta, T)
        kls = sums(terms)
        if g_ptr is not None:
            store_rows(g_ptr, g_b, b, 0, cols, _scaled(grads, scale), C, G_VEC)
    else:
        rows, is_label, is_other = _block(z, t, b, 0, cols, label, EACH, C, Z_VEC, T_VEC)
        found = _rest_sums(rows, is_label, is_other, k)
        for c0 in range(BLOCK, C, BLOCK):
            rows, is_label, is_other = _block(z, t, b, c0, cols, label, EACH, C, Z_VEC, T_VEC)
            found = _merged(found, _rest_sums(rows, is_label, is_other, k), k)
        kls = _scaled(found[0][1:], 0.0)
        for c0 in range(0, C, BLOCK):
            rows, is_label, is_other = _block(z, t, b, c0, cols, label, EACH, C, Z_VEC, T_VEC)
            terms, grads = _compared(rows, found, is_label, is_other, alpha, beta, T)
            kls = _added(kls, sums(terms))
            if g_ptr is not None:
                store_rows(g_ptr, g_b, b, c0, cols, _scaled(grads, scale), C, G_VEC)
    _store_losses(loss_ptr, found, kls, alpha, beta, T, scale)


@on_device
def decoupled_distillation(
    logits_SBC: Tensor,
    target_SBC: Tensor,
    labels_B: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    ask: bool,
) -> tuple[Tensor, Tensor]:
    """Each student's loss ``[S]``, and where ``ask`` its gradient ``[S, B, C]`` for an incoming one of 1,
    else ``[0]``; both fp32: one launch, and the sum over the batch."""
    S, B, C = logits_SBC.shape
    gradient = logits_SBC.new_empty((S, B, C) if ask else 0, dtype=torch.float32)
    loss_SB = logits_SBC.new_empty((S, B), dtype=torch.float32)
    if B:
        warp = warp_size()
        each = S if target_SBC.shape[0] == 1 and S <= SHARING else 1
        block, warps = block_and_warps(each + 1, C, False, warp)
        if block < C and each > 1:
            each = 1
            block, warps = block_and_warps(2, C, False, warp)
        z, t = row_layout(logits_SBC), row_layout(target_SBC)
        g = row_layout(gradient) if ask else (0, 0, 1)
        decoupled_kernel[(B, S // each)](
            logits_SBC, *z[:2], target_SBC, t[0] if target_SBC.shape[0] > 1 else 0, t[1],
            labels_B, labels_B.stride(0), alpha, beta, temperature,
            loss_SB, gradient if ask else None, g[1],
            each, C, z[2], t[2], g[2], block, **compiler_options(warps, warp),
        )  # fmt: skip
    return loss_SB.sum(1), gradient
