"""Divergences, losses and gradients of the mixture-distillation kernel, given its sums; its second
launch, from per-sample losses to batch means and the total.

``mix`` holds a student's mixing weights, or their logarithms where probabilities are mixed; UNHEARD
for a source at -inf.
"""

import triton
import triton.language as tl
from fastokd.kernels._mixture_sums import LOG2E, UNHEARD, has_target, mixed_row, share
from fastokd.kernels._tiles import PAD


@triton.jit
def log_probs(rows, tops, totals, inv_T):
    """Each source's log softmax at T."""
    out = ()
    for n in tl.static_range(len(rows)):
        out += ((rows[n] - tops[n]) * inv_T - tl.log(totals[n]),)
    return out


@triton.jit
def log_target(log_p, log_mix):
    """log sum_n mix_n p_n, never through an underflowed sum."""
    terms, top = (), tl.zeros_like(log_p[0]) + PAD
    for n in tl.static_range(len(log_p)):
        terms += (tl.where(log_mix[n] != UNHEARD, log_p[n] + log_mix[n], PAD),)
        top = tl.maximum(top, terms[n])
    total = tl.zeros_like(top)
    for n in tl.static_range(len(log_p)):
        total += tl.exp2((terms[n] - top) * LOG2E)
    return top + tl.log(total)


@triton.jit
def targets(log_p, log_q, mix, MIX: tl.constexpr):
    """A student's target probabilities, and for each source log of target over student.

    With ``MIX`` pairwise each source is a target of its own; the student's gradient needs their
    mixture.
    """
    ratios = ()
    if MIX == "probs":
        log_t = log_target(log_p, mix)
        target = tl.exp2(log_t * LOG2E)
        for _ in tl.static_range(len(log_p)):
            ratios += (log_t - log_q,)
    else:
        target = tl.zeros_like(log_q)
        for n in tl.static_range(len(log_p)):
            more = target + mix[n] * tl.exp2(log_p[n] * LOG2E)
            target = tl.where(mix[n] != UNHEARD, more, target)
            ratios += (log_p[n] - log_q,)
    return target, ratios


@triton.jit
def source_terms(log_p, log_q, mix, MIX: tl.constexpr):
    """The tiles whose sums are a student's K_n; none for mixtures of logits."""
    out = ()
    if len(log_p) > 0:
        _, ratios = targets(log_p, log_q, mix, MIX)
    for n in tl.static_range(len(log_p)):
        out += (tl.exp2(log_p[n] * LOG2E) * ratios[n],)
    return out


@triton.jit
def store_losses(
    loss_ptr, mix_tile, stats, k_tile, T, b,
    S: tl.constexpr, TILE: tl.constexpr, MIX: tl.constexpr, MIXTURE_CE: tl.constexpr,
):  # fmt: skip
    """All students' three losses, from vectors of their stats and tiles of weights and K_n."""
    s = tl.arange(0, TILE)
    # Past the last student the sums are 0; adding 1 avoids log 0.
    one = tl.where(s < S, 0.0, 1.0)
    heard = mix_tile != UNHEARD
    taught = tl.max(heard.to(tl.int32), 1) > 0
    ce = stats[9] * tl.log(stats[1] + one) - stats[3]
    mixture = tl.zeros_like(ce)
    if MIXTURE_CE:
        mixture += stats[9] * tl.log(stats[7] + one) - stats[8]
    if MIX == "logits":
        kl = stats[6] / (stats[5] + one) - tl.log((stats[5] + one) / (stats[2] + one))
    else:
        kl = tl.sum(tl.where(heard, share(mix_tile, MIX) * k_tile, 0.0), 1)
    B = tl.num_programs(0)
    at = loss_ptr + s * B + b
    tl.store(at, ce, mask=s < S)
    tl.store(at + S * B, tl.where(taught, T * T * kl, 0.0), mask=s < S)
    tl.store(at + 2 * S * B, tl.where(taught, mixture, 0.0), mask=s < S)


@triton.jit
def send_gradients(
    grads, rows, z, log_p, log_q, y, mix, stats, source_sums, ce, kd, mixture, T, s,
    MIX: tl.constexpr, MIXTURE_CE: tl.constexpr, DETACH: tl.constexpr,
    FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of student s's losses in each row; its own row is ``z``.

    Also returns the gradient in its mixture of logits. ``ce``, ``kd`` and ``mixture`` are the
    student's weights divided by the batch size.
    """
    MIXED: tl.constexpr = MIXTURE_CE or (MIX == "logits" and not DETACH)
    PAIRED: tl.constexpr = MIX != "logits" and not DETACH
    inv_T = 1.0 / T
    k = inv_T * LOG2E
    kd = tl.where(has_target(mix), kd * T, 0.0)
    d = z - stats[0]
    direct = tl.exp2(d * LOG2E) * (ce * stats[9] / stats[1]) - ce * y
    direct += tl.exp2(d * k) * (kd / stats[2])
    if MIX == "logits" or MIXTURE_CE:
        u = mixed_row(rows, mix, MIX) - stats[4]
    mixed_grad = tl.zeros_like(d)
    if MIX == "logits":
        target = tl.exp2(u * k) * (kd / stats[5])
        direct -= target
        if not DETACH:
            # log t/q - KL: the logarithms of the sums cancel.
            mixed_grad = target * ((u - d) * inv_T - stats[6] / stats[5])
    else:
        target, ratios = targets(log_p, log_q, mix, MIX)
        direct -= kd * target
    if MIXTURE_CE:
        mixed_grad += tl.exp2(u * LOG2E) * (mixture * stats[9] / stats[7]) - mixture * y
    sent = ()
    # Recompute the student's index opaquely, to shorten the live range of the masks that picked its row.
    same = s + tl.program_id(1)
    for n in tl.static_range(len(rows)):
        grad = grads[n]
        if MIXED or PAIRED:
            g = mixed_grad
            if PAIRED:
                g += kd * tl.exp2(log_p[n] * LOG2E) * (ratios[n] - source_sums[n])
            # Another form of mixed_row's mask, to shorten its live range.
            grad = tl.where(mix[n] > 1.0, grad, grad + share(mix[n], MIX) * g)
        if n >= FIRST and n < FIRST + COUNT:
            grad = tl.where(same == n, grad + direct, grad)
        sent += (grad,)
    return sent, mixed_grad


@triton.jit
def products(rows, mixed_grad, NEEDED: tl.constexpr):
    """The tiles whose sums are the gradients in a student's mixing weights."""
    out = ()
    if NEEDED:
        for n in tl.static_range(len(rows)):
            out += (mixed_grad * rows[n],)
    return out


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
