"""Scores from queries and keys inside the kernel, and the way back (OKDDip's Equation 4).

Peers attend to peers. A student after the last peer is the leader: it listens to every peer alike,
and nobody hears it.
"""

import triton
import triton.language as tl


@triton.jit
def _offsets(stride_b, stride_p, stride_d, b, d0, TILE: tl.constexpr, D_TILE: tl.constexpr):
    p = tl.arange(0, TILE)[:, None]
    d = d0 + tl.arange(0, D_TILE)[None, :]
    return b * stride_b + p * stride_p + d * stride_d, p, d


@triton.jit
def attention_scores(
    q_ptr, q_b, q_p, q_d, k_ptr, k_b, k_p, k_d, b,
    P: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, D_TILE: tl.constexpr,
):  # fmt: skip
    """``[TILE, TILE]``: query . key for peers, 0 in the leader's row, -inf where nobody listens."""
    scores = tl.zeros([TILE, TILE], tl.float32)
    for d0 in range(0, D, D_TILE):
        at, p, d = _offsets(q_b, q_p, q_d, b, d0, TILE, D_TILE)
        q = tl.load(q_ptr + at, mask=(p < P) & (d < D), other=0.0).to(tl.float32)
        at, p, d = _offsets(k_b, k_p, k_d, b, d0, TILE, D_TILE)
        k = tl.load(k_ptr + at, mask=(p < P) & (d < D), other=0.0).to(tl.float32)
        scores += tl.sum(q[:, None, :] * k[None, :, :], 2)
    s, n = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    return tl.where(n < P, tl.where(s < P, scores, 0.0), float("-inf"))


@triton.jit
def attention_gradients(
    grad_scores, q_ptr, q_b, q_p, q_d, k_ptr, k_b, k_p, k_d, gq_ptr, gk_ptr, b,
    P: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, D_TILE: tl.constexpr,
):  # fmt: skip
    """Stores d query and d key, ``[B, P, D]``, whichever has a pointer."""
    s, n = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    grad = tl.where((s < P) & (n < P), grad_scores, 0.0)[:, :, None]
    for d0 in range(0, D, D_TILE):
        out, p, d = _offsets(P * D, D, 1, b, d0, TILE, D_TILE)
        mask = (p < P) & (d < D)
        if gq_ptr is not None:
            at, p, d = _offsets(k_b, k_p, k_d, b, d0, TILE, D_TILE)
            k = tl.load(k_ptr + at, mask=mask, other=0.0).to(tl.float32)
            gq = tl.sum(grad * k[None, :, :], 1)
            tl.store(gq_ptr + out, gq.to(gq_ptr.dtype.element_ty), mask=mask)
        if gk_ptr is not None:
            at, p, d = _offsets(q_b, q_p, q_d, b, d0, TILE, D_TILE)
            q = tl.load(q_ptr + at, mask=mask, other=0.0).to(tl.float32)
            gk = tl.sum(grad * q[:, None, :], 0)
            tl.store(gk_ptr + out, gk.to(gk_ptr.dtype.element_ty), mask=mask)
