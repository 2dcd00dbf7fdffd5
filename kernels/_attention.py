"""Scores from queries and keys inside the kernel, and their gradients (OKDDip's Equation 10).

Queries and keys are ``[B, P, D]``, contiguous. Peers attend to peers. A student after the last peer
is the leader: it weighs every peer alike and is no source.
"""

import triton
import triton.language as tl


@triton.jit
def _place(b, d0, P: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, D_TILE: tl.constexpr):
    """Offsets ``[TILE, D_TILE]`` of a sample's entries from column d0 on; and p and d."""
    p = tl.arange(0, TILE)[:, None]
    d = d0 + tl.arange(0, D_TILE)[None, :]
    return b * (P * D) + p * D + d, p, d


@triton.jit
def attention_scores(
    q_ptr, k_ptr, b, P: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, D_TILE: tl.constexpr
):
    """``[TILE, TILE]``: query . key for peers, 0 in the leader's row, -inf for what is no source."""
    scores = tl.zeros([TILE, TILE], tl.float32)
    for d0 in range(0, D, D_TILE):
        at, p, d = _place(b, d0, P, D, TILE, D_TILE)
        inside = (p < P) & (d < D)
        q = tl.load(q_ptr + at, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scores += tl.sum(q[:, None, :] * k[None, :, :], 2)
    s, n = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    return tl.where(n < P, tl.where(s < P, scores, 0.0), float("-inf"))


@triton.jit
def attention_gradients(
    grad_scores, q_ptr, k_ptr, gq_ptr, gk_ptr, b,
    P: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, D_TILE: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of query and key, each where its pointer is given."""
    # Recompute the masks in another form than in attention_scores, to shorten their live ranges.
    # What is no source has no gradient already.
    cell = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    grad = tl.where(cell < P * TILE, grad_scores, 0.0)
    # Triton turns a sum over dimension 1 of such a product into a dot in TF32.
    to_query, to_key = tl.trans(grad)[:, :, None], grad[:, :, None]
    for d0 in range(0, D, D_TILE):
        at, p, d = _place(b, d0, P, D, TILE, D_TILE)
        inside = (p * D + d < P * D) & (d < D)
        if gq_ptr is not None:
            k = tl.load(k_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(gq_ptr + at, tl.sum(to_query * k[:, None, :], 0), mask=inside)
        if gk_ptr is not None:
            q = tl.load(q_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(gk_ptr + at, tl.sum(to_key * q[:, None, :], 0), mask=inside)
