"""The one distillation loss on a GPU: losses and every gradient from one launch.

For student s and sample b, with a = softmax(scores) and sources n (students first, then extras),
z a source's logits, M = sum_n a_sn z_n, p_n = softmax(z_n / T), q_s = p_s, t_s the target
(softmax(M / T), sum_n a_sn p_n, or each p_n for itself) and y the smoothed
labels, times the sample's weight where it has one:

    ce_s = -sum_c y log softmax(z_s)                 d ce / d z_s = mass(y) softmax(z_s) - y
    kd_s = T^2 KL(t_s || q_s)                        d kd / d z_s = T (q_s - t_s)
      logits    d kd / d M   = T t (log t/q - KL)    then d z_n += a_sn dM, d a_sn = dM . z_n
      probs     d kd / d z_n = T a_sn p_n (log t/q - K_n),   K_n = sum_c p_n log t/q
      pairwise  d kd / d z_n = T a_sn p_n (log p_n/q - K_n), K_n = KL(p_n || q_s)
                d kd / d a_sn = T^2 K_n (both; kd = T^2 sum_n a_sn K_n)
    mixture_s = CE(M, y)                             d / d M = mass(y) softmax(M) - y
    d scores_sn = a_sn (d a_sn - sum_m a_sm d a_sm)

One program computes one sample. Where all its rows fit the registers, each logit is read once and
each gradient written once; else the classes are taken in blocks: one sweep for the stats, one for
the K_n (probs and pairwise; their gradient needs sums that need the softmaxes' sums), one that
writes the gradients. Programs are independent, and nothing is specialised on the batch.

With queries and keys the scores are made in the kernel (OKDDip's Equation 10):

    scores_ab = query_a . key_b    between peers; 0 from the leader (the last student where there is
                                   one more than peers) to each peer; -inf to the leader
    d query_a = sum_b d scores_ab key_b,    d key_b = sum_a d scores_ab query_a
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastokd.kernels import _mixture, _mixture_sums
from fastokd.kernels._attention import attention_gradients, attention_scores
from fastokd.kernels._launch import (
    block_and_warps,
    compiler_options,
    on_device,
    query_columns,
    warp_size,
)
from fastokd.kernels._mixture import reduce_kernel, weight
from fastokd.kernels._tiles import load_rows, store_rows, sums
from fastokd.kernels.layout import Loss, empty_gradient, row_layout
from torch import Tensor

# The most students in one loop past 8 sources: each selects its row among as many by masks, which take
# registers too.
GROUP = tl.constexpr(8)


@triton.jit
def _block(
    z, x, labels, b, c0, cols, S: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
    Z_VEC: tl.constexpr, X_VEC: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """Every row and the labels over a block of classes from c0 on; tensors come with their strides."""
    rows = load_rows(z, b, c0, cols, S, C, Z_VEC)
    if E > 0:
        rows += load_rows(x, b, c0, cols, E, C, X_VEC)
    return rows, _mixture_sums.labels_tile(labels, b, c0 + cols, C, SOFT)


@triton.jit
def _zeros(like, N: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        out += (tl.zeros_like(like),)
    return out


_UNSPECIALISED = ["z_s", "z_b", "x_s", "x_b", "gz_b", "gx_b", "label_b"]
_UNSPECIALISED += ["score_b", "score_s", "score_n"]
_UNSPECIALISED += ["ce_stride", "kd_stride", "mixture_stride"]


@triton.jit(do_not_specialize=_UNSPECIALISED)
def mixture_distillation_kernel(
    z_ptr, z_s, z_b, x_ptr, x_s, x_b, label_ptr, label_b,
    score_ptr, score_b, score_s, score_n, key_ptr,
    ce_ptr, ce_stride, ce_number, kd_ptr, kd_stride, kd_number,
    mixture_ptr, mixture_stride, mixture_number, T_ptr, T_number, smoothing,
    label2_ptr, share2_ptr, sample_weight_ptr,
    loss_ptr, gz_ptr, gz_b, gx_ptr, gx_b, gscore_ptr, gkey_ptr,
    S: tl.constexpr, E: tl.constexpr, C: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    MIX: tl.constexpr, MIXTURE_CE: tl.constexpr, DETACH: tl.constexpr, SOFT: tl.constexpr,
    Z_VEC: tl.constexpr, X_VEC: tl.constexpr, GZ_VEC: tl.constexpr, GX_VEC: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, D_TILE: tl.constexpr,
):  # fmt: skip
    """One sample a program. Scores come from ``score_ptr``, or where D > 0 from P queries and keys.

    The mixing weights and, between sweeps, the K_n and the stats are tiles and vectors spread over
    the threads, from which each student's entries are extracted: S x N numbers don't fit one
    thread's registers.
    """
    N: tl.constexpr = S + E
    USES_M: tl.constexpr = MIX == "logits" or MIXTURE_CE
    GRAD_MIX: tl.constexpr = gscore_ptr is not None or gkey_ptr is not None
    GRADIENTS: tl.constexpr = GRAD_MIX or gz_ptr is not None or gx_ptr is not None
    DOTS: tl.constexpr = GRAD_MIX and (MIXTURE_CE or (MIX == "logits" and not DETACH))
    RESIDENT: tl.constexpr = BLOCK >= C
    LOOPS: tl.constexpr = (
        1 if N <= 8 or not RESIDENT else (S + GROUP - 1) // GROUP if E == 0 else (S + 2) // 3
    )
    EACH: tl.constexpr = (S + LOOPS - 1) // LOOPS
    # How many K_n a student has.
    PAIRS: tl.constexpr = 0 if MIX == "logits" else N
    b, part = tl.program_id(0).to(tl.int64), 1.0 / tl.num_programs(0)
    T = weight((T_ptr, 0, T_number), 0)
    inv_T = 1.0 / T
    z, x = (z_ptr, z_s, z_b), (x_ptr, x_s, x_b)
    labels = (label_ptr, label_b, smoothing, label2_ptr, share2_ptr, sample_weight_ptr)
    ce = (ce_ptr, ce_stride, ce_number)
    kd = (kd_ptr, kd_stride, kd_number)
    mixture = (mixture_ptr, mixture_stride, mixture_number)
    row, column = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    inside = (row < S) & (column < N)
    cols = tl.arange(0, BLOCK)

    if RESIDENT:  # issue these loads first, to overlap with the scores
        rows, y = _block(z, x, labels, b, 0, cols, S, E, C, Z_VEC, X_VEC, SOFT)
    if D > 0:
        scores = attention_scores(score_ptr, key_ptr, b, P, D, TILE, D_TILE)
    else:
        at = score_ptr + b * score_b + row * score_s + column * score_n
        scores = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
    mix_flat = tl.reshape(_mixture_sums.mixing_weights(scores, MIX), [TILE * TILE])
    k_flat = tl.zeros([TILE * TILE], tl.float32)
    grad_flat = tl.zeros([TILE * TILE], tl.float32)
    stats = _mixture_sums.no_stats(TILE)
    if RESIDENT:
        grads, log_p = _zeros(y, N), ()
        if PAIRS > 0:
            tops, totals = _mixture_sums.block_log_sums(rows, inv_T)
            log_p = _mixture.log_probs(rows, tops, totals, inv_T)
        for s0 in tl.static_range(0, S, EACH):
            for s in range(s0, min(s0 + EACH, S)):
                own = _mixture_sums.pick(rows[0:S], s, s0, EACH)
                log_q = _mixture_sums.pick(log_p[0:S], s, s0, EACH)
                mix = _mixture_sums.entries(mix_flat, s, N, TILE)
                found = _mixture_sums.block_stats(own, rows, mix, y, inv_T, MIX, MIXTURE_CE)
                stats = _mixture_sums.with_student(stats, s, found, TILE)
                k = sums(_mixture.source_terms(log_p, log_q, mix, MIX))
                k_flat = _mixture_sums.with_entries(k_flat, s, k, TILE)
                if GRADIENTS:
                    grads, mixed_grad = _mixture.send_gradients(
                        grads, rows, own, log_p, log_q, y, mix, found, k,
                        weight(ce, s) * part, weight(kd, s) * part, weight(mixture, s) * part, T, s,
                        MIX, MIXTURE_CE, DETACH, s0, EACH,
                    )  # fmt: skip
                    dots = sums(_mixture.products(rows, mixed_grad, DOTS))
                    grad_flat = _mixture_sums.with_entries(grad_flat, s, dots, TILE)
        if gz_ptr is not None:
            store_rows(gz_ptr, gz_b, b, 0, cols, grads[0:S], C, GZ_VEC)
        if gx_ptr is not None:
            store_rows(gx_ptr, gx_b, b, 0, cols, grads[S:N], C, GX_VEC)
    else:
        log_sums = _mixture_sums.no_log_sums(TILE)
        for c0 in range(0, C, BLOCK):
            rows, y = _block(z, x, labels, b, c0, cols, S, E, C, Z_VEC, X_VEC, SOFT)
            more = _mixture_sums.no_stats(TILE)
            for s0 in tl.static_range(0, S, EACH):
                for s in range(s0, min(s0 + EACH, S)):
                    mix = _mixture_sums.entries(mix_flat, s, N if USES_M else 0, TILE)
                    own = _mixture_sums.pick(rows[0:S], s, s0, EACH)
                    found = _mixture_sums.block_stats(own, rows, mix, y, inv_T, MIX, MIXTURE_CE)
                    more = _mixture_sums.with_student(more, s, found, TILE)
            stats = _mixture_sums.merge_stats(stats, more, inv_T)
            if PAIRS > 0:
                tops, totals = _mixture_sums.block_log_sums(rows, inv_T)
                log_sums = _mixture_sums.merge_log_sums(log_sums, tops, totals, inv_T, TILE)
        if PAIRS > 0:
            for c0 in range(0, C, BLOCK):
                rows, y = _block(z, x, labels, b, c0, cols, S, E, C, Z_VEC, X_VEC, SOFT)
                tops = _mixture_sums.unpacked(log_sums[0], N, TILE)
                totals = _mixture_sums.unpacked(log_sums[1], N, TILE)
                log_p = _mixture.log_probs(rows, tops, totals, inv_T)
                for s0 in tl.static_range(0, S, EACH):
                    for s in range(s0, min(s0 + EACH, S)):
                        log_q = _mixture_sums.pick(log_p[0:S], s, s0, EACH)
                        mix = _mixture_sums.entries(mix_flat, s, N, TILE)
                        k = sums(_mixture.source_terms(log_p, log_q, mix, MIX))
                        k_flat = _mixture_sums.with_entries(k_flat, s, k, TILE)
        # Stored here, so that fewer addresses stay in registers.
        _mixture.store_losses(
            loss_ptr, tl.reshape(mix_flat, [TILE, TILE]), stats, tl.reshape(k_flat, [TILE, TILE]),
            T, b, S, TILE, MIX, MIXTURE_CE,
        )  # fmt: skip
        if GRADIENTS:
            for c0 in range(0, C, BLOCK):
                rows, y = _block(z, x, labels, b, c0, cols, S, E, C, Z_VEC, X_VEC, SOFT)
                tops = _mixture_sums.unpacked(log_sums[0], PAIRS, TILE)
                totals = _mixture_sums.unpacked(log_sums[1], PAIRS, TILE)
                grads, log_p = _zeros(y, N), _mixture.log_probs(rows[0:PAIRS], tops, totals, inv_T)
                for s0 in tl.static_range(0, S, EACH):
                    for s in range(s0, min(s0 + EACH, S)):
                        if PAIRS > 0:
                            mix, k = _mixture_sums.entries_of_two(mix_flat, k_flat, s, N, TILE)
                        else:
                            mix, k = _mixture_sums.entries(mix_flat, s, N, TILE), ()
                        grads, mixed_grad = _mixture.send_gradients(
                            grads, rows, _mixture_sums.pick(rows[0:S], s, s0, EACH),
                            log_p, _mixture_sums.pick(log_p[0:S], s, s0, EACH), y,
                            mix, _mixture_sums.of_student(stats, s, TILE), k,
                            weight(ce, s) * part, weight(kd, s) * part, weight(mixture, s) * part,
                            T, s, MIX, MIXTURE_CE, DETACH, s0, EACH,
                        )  # fmt: skip
                        dots = sums(_mixture.products(rows, mixed_grad, DOTS))
                        grad_flat = _mixture_sums.with_entries(grad_flat, s, dots, TILE)
                if gz_ptr is not None:
                    store_rows(gz_ptr, gz_b, b, c0, cols, grads[0:S], C, GZ_VEC)
                if gx_ptr is not None:
                    store_rows(gx_ptr, gx_b, b, c0, cols, grads[S:N], C, GX_VEC)

    k_tile = tl.reshape(k_flat, [TILE, TILE])
    mix_tile = tl.reshape(mix_flat, [TILE, TILE])
    if RESIDENT:
        _mixture.store_losses(loss_ptr, mix_tile, stats, k_tile, T, b, S, TILE, MIX, MIXTURE_CE)
    if GRAD_MIX:
        grad_mix = tl.reshape(grad_flat, [TILE, TILE])
        if PAIRS > 0 and not DETACH:
            grad_mix += weight(kd, tl.minimum(row, S - 1)) * part * T * T * k_tile
        heard, mix_tile = mix_tile != _mixture_sums.UNHEARD, _mixture_sums.share(mix_tile, MIX)
        grad_mix = tl.where(heard, mix_tile * grad_mix, 0.0)
        total = tl.sum(grad_mix, 1)[:, None]
        grad_scores = tl.where(heard, grad_mix - mix_tile * total, 0.0)
        if D > 0:
            attention_gradients(
                grad_scores, score_ptr, key_ptr, gscore_ptr, gkey_ptr, b, P, D, TILE, D_TILE
            )
        else:
            at = gscore_ptr + b * (S * N) + row * N + column
            tl.store(at, grad_scores.to(gscore_ptr.dtype.element_ty), mask=inside)


@on_device
def mixture_distillation(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Both fused losses' operator: the loss of every sample, then a reduction over the batch.

    Returns:
        total, ce_S and kd_S (fp32), then the gradients that are asked for, for an incoming gradient
        of 1: of logits and extras in fp32 where those are fp16 and else in their dtype, of scores
        (or queries) and keys in fp32.
    """
    loss = Loss(*arguments)
    z_SBC, x_EBC, labels, scores, key, *_ = loss
    S, B, C = z_SBC.shape
    N = S + (0 if x_EBC is None else x_EBC.shape[0])
    no_width = key is not None and key.shape[2] == 0
    if no_width:  # the kernel would take queries without a width for scores
        scores, key = (x.new_zeros((*x.shape[:2], 1)) for x in (scores, key))
    if key is not None:
        scores, key = scores.contiguous(), key.contiguous()
    P, D = (0, 0) if key is None else key.shape[1:]

    def new(*shape: int) -> Tensor:
        return z_SBC.new_empty(shape, dtype=torch.float32)

    gz = empty_gradient(z_SBC) if loss.grad_logits else None
    gx = empty_gradient(x_EBC) if loss.grad_extra and x_EBC is not None else None
    g_scores = g_key = summed = None
    if loss.grad_scores:
        g_scores = new(B, S, N) if key is None else new(*scores.shape)
        summed = new(S, N) if scores.dim() == 2 else None
    if loss.grad_key and key is not None:
        g_key = new(*key.shape)
    losses_3SB, total, ce_S, kd_S = new(3, S, B), new(), new(S), new(S)
    weights = (
        *_weight(loss.ce_weight_S, loss.ce_weight),
        *_weight(loss.kd_weight_S, loss.kd_weight),
        *_weight(loss.mixture_ce_weight_S, loss.mixture_ce_weight),
    )
    if B:
        z, x, gz_rows, gx_rows = (row_layout(rows) for rows in (z_SBC, x_EBC, gz, gx))
        strides = scores.stride() if scores.dim() == 3 else (0, *scores.stride())
        warp = warp_size()
        block, warps = block_and_warps(N, C, loss.mix != "logits", warp)
        tile = triton.next_power_of_2(N)
        mixture_distillation_kernel[(B,)](
            z_SBC, *z[:2], x_EBC, *x[:2], labels, labels.stride(0), scores, *strides, key,
            *weights, loss.temperature_0d, float(loss.temperature), float(loss.label_smoothing),
            *_of_samples(loss),
            losses_3SB, gz, gz_rows[1], gx, gx_rows[1], g_scores, g_key,
            S, N - S, C, P, D, loss.mix, loss.has_mixture_ce, loss.detach_targets,
            labels.dim() == 2, z[2], x[2], gz_rows[2], gx_rows[2],
            block, tile, query_columns(tile, warp),
            **compiler_options(warps, warp),
        )  # fmt: skip
    rows = triton.next_power_of_2(3 * S)
    reduce_kernel[(1 if summed is None else 1 + S,)](
        losses_3SB, *weights, total, ce_S, kd_S, None if summed is None else g_scores, summed,
        B, S, 1 if summed is None else N, rows,
        triton.next_power_of_2(1 if summed is None else N), 2048 // rows, num_warps=4,
    )  # fmt: skip
    gradients = [gz, gx, g_scores if summed is None else summed, g_key]
    if no_width:
        gradients[2:] = [None if g is None else g[..., :0] for g in gradients[2:]]
    return total, ce_S, kd_S, [g for g in gradients if g is not None]


def _of_samples(loss: Loss) -> tuple[Tensor | None, ...]:
    """Second ids, their shares and the samples' weights, dense."""
    given = (loss.labels2_B, loss.share2_B, loss.sample_weight_B)
    return tuple(None if x is None else x.contiguous() for x in given)


def _weight(tensor: Tensor | None, number: float) -> tuple[Tensor | None, int, float]:
    """The tensor, the stride from one student's entry to the next, and the number."""
    stride = tensor.stride(0) if tensor is not None and tensor.dim() else 0
    return tensor, stride, float(number)
