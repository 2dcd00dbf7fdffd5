"""DIST on a GPU: three launches, since a sample's gradient needs every class's sums over the batch, and
those need every sample's softmax.

With y and u the probabilities of student and target at T, and for two vectors a and b, centred as a' and
b', their correlation and its gradient

    rho = a' . b' / D,  D = |a'| |b'| + eps         d rho / d a = v b' - w a'
    v = 1 / D,  w = (a' . b') |b'| / (|a'| D^2)     (0 where |a'| is 0)

``samples_kernel``, a program a sample of a student, takes the softmaxes' sums and rho, v and w over the
classes, whose mean probability is 1 / C. ``classes_kernel``, a program a few classes of a student, takes
means, rho, v and w over the batch, tile by tile: sums of centred products, merged as those of two sets
of samples are (Chan et al., 1979). What a mean's rounding to fp32 adds to each centred value is taken from
the class's gradient: v and w may be large. ``gradient_kernel``, a program a sample, has then

    g  = -T^2 (beta / B (d rho_b / d y) + gamma / C (d rho_c / d y)),   dz = y (g - y . g) / T

and a student's first program adds up its loss. All three read logits and target, the last two from L2
(5.1 MB of 4 students, B 256, C 1,000); the gradient is written once. Sums are in one fixed order, the
programs of a launch are independent, and nothing is specialised on the batch.
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

# What is kept of each sample: of student and of target the maximum and the sum of exp; v, w and rho. Of
# each class: the means of student and target; v, w, what is added to v b' - w a', and rho.
OF_SAMPLE, OF_CLASS = tl.constexpr(7), tl.constexpr(6)
SAMPLES, CLASSES = 128, 16  # of a tile of classes_kernel
EPS = tl.constexpr(1e-8)


@triton.jit
def _correlation(yy, uu, yu):
    """v, w and rho from the sums of centred products."""
    y, u = tl.sqrt_rn(yy), tl.sqrt_rn(uu)
    D = y * u + EPS
    some = y > 0.0
    w = tl.where(some, (yu / tl.where(some, y, 1.0)) * (u / D) / D, 0.0)
    return 1.0 / D, tl.where(y != y, y, w), yu / D


@triton.jit
def _probabilities(x, top, total, k, listed):
    """Divided as it is rounded, so that a mean of one sample is exactly its probability."""
    return tl.where(listed, tl.div_rn(tl.exp2((x - top) * k), total), 0.0)


@triton.jit
def _block_sums(rows, c, k, C: tl.constexpr):
    """The maximum and the sum of exp of both rows."""
    tops = maxima(rows)
    # Where a block is -inf alone, its sum is 0, not NaN.
    tops = (tl.maximum(tops[0], PAD), tl.maximum(tops[1], PAD))
    totals = sums(
        (
            tl.where(c < C, tl.exp2((rows[0] - tops[0]) * k), 0.0),
            tl.where(c < C, tl.exp2((rows[1] - tops[1]) * k), 0.0),
        )
    )
    return tops[0], totals[0], tops[1], totals[1]


@triton.jit
def _merged(one, two, k):
    """Of two blocks of classes."""
    y, u = tl.maximum(one[0], two[0]), tl.maximum(one[2], two[2])
    y_total = one[1] * tl.exp2((one[0] - y) * k) + two[1] * tl.exp2((two[0] - y) * k)
    u_total = one[3] * tl.exp2((one[2] - u) * k) + two[3] * tl.exp2((two[2] - u) * k)
    return y, y_total, u, u_total


@triton.jit
def _products(rows, found, c, k, C: tl.constexpr):
    """Sums of products of both rows' probabilities, centred."""
    y = tl.where(c < C, _probabilities(rows[0], found[0], found[1], k, c < C) - 1.0 / C, 0.0)
    u = tl.where(c < C, _probabilities(rows[1], found[2], found[3], k, c < C) - 1.0 / C, 0.0)
    return sums((y * y, u * u, y * u))


@triton.jit(do_not_specialize=["z_s", "z_b", "t_s", "t_b"])
def samples_kernel(
    z_ptr, z_s, z_b, t_ptr, t_s, t_b, T, sample_ptr,
    C: tl.constexpr, Z_VEC: tl.constexpr, T_VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OF_SAMPLE of sample ``program_id(0)`` of student ``program_id(1)``: ``[OF_SAMPLE, S, B]``."""
    b, s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    k = LOG2E / T
    cols = tl.arange(0, BLOCK)
    z = (z_ptr + s * z_s * Z_VEC, z_s, z_b)
    t = (t_ptr + s * t_s * T_VEC, t_s, t_b)
    rows = load_rows(z, b, 0, cols, 1, C, Z_VEC) + load_rows(t, b, 0, cols, 1, C, T_VEC)
    found = _block_sums(rows, cols, k, C)
    if BLOCK >= C:
        products = _products(rows, found, cols, k, C)
    else:
        for c0 in range(BLOCK, C, BLOCK):
            rows = load_rows(z, b, c0, cols, 1, C, Z_VEC) + load_rows(t, b, c0, cols, 1, C, T_VEC)
            found = _merged(found, _block_sums(rows, c0 + cols, k, C), k)
        zero = 0.0 * found[1]
        products = (zero, zero, zero)
        for c0 in range(0, C, BLOCK):
            rows = load_rows(z, b, c0, cols, 1, C, Z_VEC) + load_rows(t, b, c0, cols, 1, C, T_VEC)
            more = _products(rows, found, c0 + cols, k, C)
            products = (products[0] + more[0], products[1] + more[1], products[2] + more[2])
    kept = found + _correlation(products[0], products[1], products[2])
    step = tl.num_programs(1).to(tl.int64) * tl.num_programs(0)
    sample_ptr += s * tl.num_programs(0) + b
    for i in tl.static_range(OF_SAMPLE):
        tl.store(sample_ptr, kept[i])
        sample_ptr += step


@triton.jit
def _tile(x, b, c, B, C: tl.constexpr, VEC: tl.constexpr):
    """Samples ``b`` of classes ``c``: ``x`` is a pointer and the stride of a sample, as in ``load_rows``."""
    width: tl.constexpr = (C + VEC - 1) // VEC * VEC
    inside = (b < B)[:, None] & (c < width)[None, :]
    at = b[:, None].to(tl.int64) * x[1] * VEC + c[None, :]
    return tl.load(x[0] + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["z_s", "z_b", "t_s", "t_b", "B"])
def classes_kernel(
    z_ptr, z_s, z_b, t_ptr, t_s, t_b, T, sample_ptr, class_ptr, B,
    C: tl.constexpr, Z_VEC: tl.constexpr, T_VEC: tl.constexpr,
    SAMPLES: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """OF_CLASS of some classes of student ``program_id(1)``: ``[S, OF_CLASS, C]``."""
    s = tl.program_id(1).to(tl.int64)
    k = LOG2E / T
    c = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    z, t = (z_ptr + s * z_s * Z_VEC, z_b), (t_ptr + s * t_s * T_VEC, t_b)
    step = tl.num_programs(1).to(tl.int64) * B
    sample_ptr += s * B
    y_mean = tl.zeros([CLASSES], tl.float64)
    yy = tl.zeros([CLASSES], tl.float32)
    u_mean, uu, yu = y_mean, yy, yy
    for start in range(0, B, SAMPLES):
        b = start + tl.arange(0, SAMPLES)
        listed = (b < B)[:, None] & (c < C)[None, :]
        z_top = tl.load(sample_ptr + b, mask=b < B, other=0.0)[:, None]
        z_total = tl.load(sample_ptr + step + b, mask=b < B, other=1.0)[:, None]
        t_top = tl.load(sample_ptr + 2 * step + b, mask=b < B, other=0.0)[:, None]
        t_total = tl.load(sample_ptr + 3 * step + b, mask=b < B, other=1.0)[:, None]
        y = _probabilities(_tile(z, b, c, B, C, Z_VEC), z_top, z_total, k, listed)
        u = _probabilities(_tile(t, b, c, B, C, T_VEC), t_top, t_total, k, listed)
        more = tl.minimum(B - start, SAMPLES).to(tl.float32)
        y_more, u_more = tl.div_rn(tl.sum(y, 0), more), tl.div_rn(tl.sum(u, 0), more)
        y = tl.where(listed, y - y_more[None, :], 0.0)
        u = tl.where(listed, u - u_more[None, :], 0.0)
        # The tile's means as they are without rounding, less the means of the samples before.
        y_step = y_more + tl.div_rn(tl.sum(y, 0), more).to(tl.float64) - y_mean
        u_step = u_more + tl.div_rn(tl.sum(u, 0), more).to(tl.float64) - u_mean
        share = more / (start + more)
        y_apart, u_apart, before = y_step.to(tl.float32), u_step.to(tl.float32), start * share
        yy += tl.sum(y * y, 0) + y_apart * y_apart * before
        uu += tl.sum(u * u, 0) + u_apart * u_apart * before
        yu += tl.sum(y * u, 0) + y_apart * u_apart * before
        y_mean += y_step * share
        u_mean += u_step * share
    v, w, rho = _correlation(yy, uu, yu)
    class_ptr += s * OF_CLASS * C + c
    y_near, u_near = y_mean.to(tl.float32), u_mean.to(tl.float32)
    added = w * (y_mean - y_near).to(tl.float32) - v * (u_mean - u_near).to(tl.float32)
    kept = (y_near, u_near, v, w, added, rho)
    for i in tl.static_range(OF_CLASS):
        tl.store(class_ptr + i * C, kept[i], mask=c < C)


@triton.jit
def _gradient(rows, sample, class_ptr, c, k, by_sample, by_class, C: tl.constexpr):
    """The student's probabilities, and the loss's gradient by them."""
    listed = c < C
    y = _probabilities(rows[0], sample[0], sample[1], k, listed)
    u = _probabilities(rows[1], sample[2], sample[3], k, listed)
    g = by_sample * (sample[4] * (u - 1.0 / C) - sample[5] * (y - 1.0 / C))
    y_mean = tl.load(class_ptr + c, mask=listed, other=0.0)
    u_mean = tl.load(class_ptr + C + c, mask=listed, other=0.0)
    v = tl.load(class_ptr + 2 * C + c, mask=listed, other=0.0)
    w = tl.load(class_ptr + 3 * C + c, mask=listed, other=0.0)
    added = tl.load(class_ptr + 4 * C + c, mask=listed, other=0.0)
    return y, g + by_class * (v * (u - u_mean) - w * (y - y_mean) + added)


@triton.jit
def _sum(ptr, N, BLOCK: tl.constexpr):
    """Of ``N`` neighbours."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        total += tl.load(ptr + start + i, mask=start + i < N, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["z_s", "z_b", "t_s", "t_b", "g_b", "B"])
def gradient_kernel(
    z_ptr, z_s, z_b, t_ptr, t_s, t_b, beta, gamma, T, sample_ptr, class_ptr, loss_ptr,
    g_ptr, g_b, B,
    C: tl.constexpr, Z_VEC: tl.constexpr, T_VEC: tl.constexpr, G_VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sample ``program_id(0)`` of student ``program_id(1)``; without a gradient the first alone."""
    b, s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    k = LOG2E / T
    step = tl.num_programs(1).to(tl.int64) * B
    sample_ptr += s * B
    class_ptr += s * OF_CLASS * C
    if b == 0:
        inter = 1.0 - _sum(sample_ptr + (OF_SAMPLE - 1) * step, B, BLOCK) / B
        intra = 1.0 - _sum(class_ptr + (OF_CLASS - 1) * C, C, BLOCK) / C
        tl.store(loss_ptr + s, T * T * (beta * inter + gamma * intra))
    if g_ptr is not None:
        sample = ()
        for i in tl.static_range(OF_SAMPLE - 1):
            sample += (tl.load(sample_ptr + i * step + b),)
        by_sample, by_class = -T * beta / B, -T * gamma / C
        cols = tl.arange(0, BLOCK)
        z = (z_ptr + s * z_s * Z_VEC, z_s, z_b)
        t = (t_ptr + s * t_s * T_VEC, t_s, t_b)
        g_ptr += s * B * g_b * G_VEC
        rows = load_rows(z, b, 0, cols, 1, C, Z_VEC) + load_rows(t, b, 0, cols, 1, C, T_VEC)
        y, g = _gradient(rows, sample, class_ptr, cols, k, by_sample, by_class, C)
        along = tl.sum(y * g, 0)
        if BLOCK >= C:
            store_rows(g_ptr, g_b, b, 0, cols, (y * (g - along),), C, G_VEC)
        else:
            for c0 in range(BLOCK, C, BLOCK):
                rows = load_rows(z, b, c0, cols, 1, C, Z_VEC)
                rows += load_rows(t, b, c0, cols, 1, C, T_VEC)
                y, g = _gradient(rows, sample, class_ptr, c0 + cols, k, by_sample, by_class, C)
                along += tl.sum(y * g, 0)
            for c0 in range(0, C, BLOCK):
                rows = load_rows(z, b, c0, cols, 1, C, Z_VEC)
                rows += load_rows(t, b, c0, cols, 1, C, T_VEC)
                y, g = _gradient(rows, sample, class_ptr, c0 + cols, k, by_sample, by_class, C)
                store_rows(g_ptr, g_b, b, c0, cols, (y * (g - along),), C, G_VEC)


@on_device
def correlation_distillation(
    logits_SBC: Tensor,
    target_SBC: Tensor,
    beta: float,
    gamma: float,
    temperature: float,
    ask: bool,
) -> tuple[Tensor, Tensor]:
    """Each student's loss ``[S]``, and where ``ask`` its gradient ``[S, B, C]`` for an incoming one of 1,
    else ``[0]``; both fp32: three launches."""
    S, B, C = logits_SBC.shape

    def new(*shape: int) -> Tensor:
        return logits_SBC.new_empty(shape, dtype=torch.float32)

    gradient = new(S, B, C) if ask else new(0)
    if not B:
        return logits_SBC.new_zeros(S, dtype=torch.float32), gradient
    loss_S, samples, classes = new(S), new(OF_SAMPLE.value, S, B), new(S, OF_CLASS.value, C)
    z, t = row_layout(logits_SBC), row_layout(target_SBC)
    g = row_layout(gradient) if ask else (0, 0, 1)
    rows = (logits_SBC, *z[:2], target_SBC, t[0] if target_SBC.shape[0] > 1 else 0, t[1])
    warp = warp_size()
    block, warps = block_and_warps(2, C, False, warp)
    options = compiler_options(warps, warp)
    samples_kernel[(B, S)](*rows, temperature, samples, C, z[2], t[2], block, **options)
    classes_kernel[(triton.cdiv(C, CLASSES), S)](
        *rows, temperature, samples, classes, B, C, z[2], t[2], SAMPLES, CLASSES,
        **compiler_options(128 // warp, warp),
    )  # fmt: skip
    gradient_kernel[(B if ask else 1, S)](
        *rows, beta, gamma, temperature, samples, classes, loss_S, gradient if ask else None, g[1],
        B, C, z[2], t[2], g[2], block, **options,
    )  # fmt: skip
    return loss_S, gradient
