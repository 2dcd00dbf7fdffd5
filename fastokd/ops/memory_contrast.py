"""The contrasts of MCL's memory form, and of MCL-OKD, with rows of a memory of all training images.

For students a, b, a sample i of the batch and its K rows k of the memory M, the sample's own first, then P of
its class, then others:

    A_ab[i, k] = e_a[i] . M_b[index[i, k]] / tau
    L(A)       = mean_i (log sum_k exp A[i, k] - the mean of A[i, k] over positives k)
    vcl        = sum_a L(A_aa) without the own column, whose positives are the P of the class
    icl        = sum_{a != b} L(A_ab), whose positives are the own column and the P of the class
    soft_vcl   = T^2 sum_{a != b} KL(A_bb || A_aa) without the own column
    soft_icl   = T^2 sum_{a != b} KL(A_ba || A_ab)
    nce        = sum_{a != b} -mean_i (log(p_0 / (p_0 + q)) + sum_{k > 0} log(q / (p_k + q)))
                 p = exp A_ab over its mean times the size of the memory, q = (K - 1) / that size, + 1e-7

The memory, the KLs' first arguments and the mean of p have no gradient.

A is the op: the C++ and the Triton form read the memory's rows where they lie, forward and backward, and never
write them as ``[B, K, D]``. What follows it is plain torch on ``[S, S, B, K]``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastokd.errors import UserError
from fastokd.ops._library import define, operator
from fastokd.ops._maps import fp32
from fastokd.ops.dispatch import choose
from fastokd.ops.mutual_contrast import Contrasts, between_students, check_numbers, crosswise

# Added to the denominators of the noise-contrastive loss, as published.
EPS = 1e-7
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the Triton form, which holds the sums of all anchors in registers.
MAX_STUDENTS, MAX_WIDTH = 8, 1024


def memory_contrast(
    embeddings_SBD: Tensor,
    memory_SND: Tensor,
    index_BK: Tensor,
    *,
    positives: int = 1,
    tau: float = 0.07,
    temperature: float = 3.0,
    impl: str = "auto",
) -> Contrasts:
    """MCL's contrasts with rows of the memory (the equations of this module).

    Differentiable once in the embeddings (``impl="torch"``: any number of times).

    Args:
        embeddings_SBD: floating point, of length 1 along D, with gradient.
        memory_SND: the embeddings of all N images by each student, floating point, without gradient. It
            must not change before the backward pass, which reads it again.
        index_BK: int64 rows of the memory: the sample's own, ``positives`` of its class, others. A row
            outside the memory raises on a CPU; the Triton form gives NaN for its similarity and its
            sample's gradient, torch on a GPU asserts.
        positives: P, at least 1.
        tau: divides the similarities; a finite number above 0.
        temperature: T; a finite number above 0.
        impl: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``. ``"auto"`` takes torch for what the others
            don't take: float64, a memory that isn't contiguous and, on a GPU, more than 8 students or
            embeddings of more than 1,024 numbers.

    Returns:
        ``Contrasts(vcl, soft_vcl, icl, soft_icl)``, in float32 or float64; 0 for an empty batch.

    Raises:
        UserError: shapes, dtypes or numbers that don't fit, an ``impl`` that can't serve the call.
    """
    tau, temperature = check_numbers(tau, temperature)
    _check(embeddings_SBD, memory_SND, index_BK)
    if not 1 <= positives < index_BK.shape[1] - 1:
        raise UserError(
            f"positives is {positives}, but a sample has {index_BK.shape[1]} rows, its own among them: "
            "choose at least 1, and fewer than the others"
        )
    if not index_BK.shape[0]:
        return Contrasts(*4 * (_nothing(embeddings_SBD),))
    A_SSBK = similarities(embeddings_SBD, memory_SND, index_BK, tau, impl=impl)
    own_SBK = A_SSBK.diagonal().movedim(-1, 0)[..., 1:]
    vcl = (own_SBK.logsumexp(-1) - own_SBK[..., :positives].mean(-1)).mean(-1).sum()
    loss_SS = (A_SSBK.logsumexp(-1) - A_SSBK[..., : positives + 1].mean(-1)).mean(-1)
    return Contrasts(
        vcl,
        temperature**2 * between_students((own_SBK / temperature).log_softmax(-1)),
        loss_SS.sum() - loss_SS.diagonal().sum(),
        temperature**2 * crosswise((A_SSBK / temperature).log_softmax(-1)),
    )


def noise_contrast(
    embeddings_SBD: Tensor,
    memory_SND: Tensor,
    index_BK: Tensor,
    *,
    tau: float = 0.1,
    impl: str = "auto",
) -> Tensor:
    """MCL-OKD's noise-contrastive loss (the equation of this module), 0-d; arguments as above."""
    tau, _ = check_numbers(tau, 1.0)
    _check(embeddings_SBD, memory_SND, index_BK)
    if not index_BK.shape[1]:
        raise UserError("index_BK has no rows: its first is the sample's own")
    if not index_BK.shape[0]:
        return _nothing(embeddings_SBD)
    A_SSBK = similarities(embeddings_SBD, memory_SND, index_BK, tau, impl=impl)
    B, K = A_SSBK.shape[2:]
    N = memory_SND.shape[1]
    mean_SS11 = A_SSBK.detach().flatten(2).logsumexp(-1)[..., None, None] - math.log(B * K)
    p_SSBK = (A_SSBK - mean_SS11).exp() / N
    q = (K - 1) / N
    hit_SSB = (p_SSBK[..., 0] / (p_SSBK[..., 0] + q + EPS)).log()
    missed_SSB = (q / (p_SSBK[..., 1:] + q + EPS)).log().sum(-1)
    loss_SS = -(hit_SSB + missed_SSB).mean(-1)
    return loss_SS.sum() - loss_SS.diagonal().sum()


def similarities(
    embeddings_SBD: Tensor,
    memory_SND: Tensor,
    index_BK: Tensor,
    tau: float,
    *,
    impl: str = "auto",
) -> Tensor:
    """A, ``[S, S, B, K]``, in float32 or float64; shapes are checked by the callers."""
    refusals = {} if impl == "torch" else _refusals(embeddings_SBD, memory_SND, index_BK)
    chosen = choose("memory_contrast", impl, embeddings_SBD.device, refusals)
    if chosen == "torch":
        return gathered_similarities(embeddings_SBD, memory_SND, index_BK, tau)
    return Similarities.apply(
        chosen, embeddings_SBD.float(), memory_SND.detach(), index_BK, 1.0 / tau
    )


def gathered_similarities(
    embeddings_SBD: Tensor, memory_SND: Tensor, index_BK: Tensor, tau: float
) -> Tensor:
    """The reference of A; it gathers ``[B, K, D]`` for each student's memory."""
    dtype = torch.promote_types(embeddings_SBD.dtype, torch.float32)
    with torch.autocast(embeddings_SBD.device.type, enabled=False):
        x_SBD = embeddings_SBD.to(dtype)
        columns = []
        for memory_ND in memory_SND.detach():
            shape = *index_BK.shape, memory_ND.shape[1]
            rows_BKD = memory_ND.index_select(0, index_BK.flatten()).view(shape).to(dtype)
            columns.append(torch.einsum("aid,ikd->aik", x_SBD, rows_BKD))
        return torch.stack(columns, dim=1) / tau


def _nothing(embeddings_SBD: Tensor) -> Tensor:
    """The loss of an empty batch."""
    dtype = torch.promote_types(embeddings_SBD.dtype, torch.float32)
    return embeddings_SBD.sum(dtype=dtype) * 0.0


def _check(embeddings_SBD: Tensor, memory_SND: Tensor, index_BK: Tensor) -> None:
    """Raises where shapes or dtypes don't fit; reads no values."""
    given = {"embeddings_SBD": embeddings_SBD, "memory_SND": memory_SND, "index_BK": index_BK}
    shapes = [x.shape for x in given.values()]
    if (
        [len(shape) for shape in shapes] != [3, 3, 2]
        or shapes[1][::2] != shapes[0][::2]
        or shapes[2][0] != shapes[0][1]
        or not shapes[0][0] * shapes[0][2]
    ):
        raise UserError(
            f"embeddings_SBD, memory_SND and index_BK have shapes {list(shapes[0])}, "
            f"{list(shapes[1])} and {list(shapes[2])}: they must be [students, batch, width], "
            "[students, images, width] and [batch, rows], of a student and a number at least"
        )
    floating = embeddings_SBD.is_floating_point() and memory_SND.is_floating_point()
    if not floating or index_BK.dtype != torch.int64:
        kinds = ", ".join(f"{name} is {x.dtype}" for name, x in given.items())
        raise UserError(f"{kinds}: they must be floating point twice, and int64")
    devices = {x.device for x in given.values()}
    if len(devices) > 1:
        places = ", ".join(f"{name} is on {x.device}" for name, x in given.items())
        raise UserError(f"{places}: move all to one device")


def _refusals(
    embeddings_SBD: Tensor, memory_SND: Tensor, index_BK: Tensor
) -> dict[str, str | None]:
    """Why the C++ and the Triton form can't take these tensors."""
    S, _, D = embeddings_SBD.shape
    both = triton = None
    if embeddings_SBD.dtype not in DTYPES or memory_SND.dtype not in DTYPES:
        both = "float64 is for impl='torch'"
    elif not memory_SND.is_contiguous():
        both = "the memory is not contiguous"
    elif S > MAX_STUDENTS or D > MAX_WIDTH:
        triton = f"it takes at most {MAX_STUDENTS} students and embeddings of {MAX_WIDTH} numbers"
    return {"cpp": both, "triton": both or triton}


define(
    "memory_similarities(Tensor x_SBD, Tensor memory_SND, Tensor index_BK, float scale) -> Tensor",
    lambda x, memory, index, scale: fp32(x, x.shape[0], x.shape[0], *index.shape),
    "memory_contrast.memory_similarities",
)
define(
    "memory_similarities_backward(Tensor grad_SSBK, Tensor memory_SND, Tensor index_BK, float scale)"
    " -> Tensor",
    lambda grad, memory, index, scale: fp32(grad, *grad.shape[1:3], memory.shape[2]),
    "memory_contrast.memory_similarities_backward",
)


class Similarities(torch.autograd.Function):
    """``(impl, embeddings, memory, index, scale) -> A``, of embeddings in float32."""

    @staticmethod
    def forward(
        ctx: Any, impl: str, x_SBD: Tensor, memory_SND: Tensor, index_BK: Tensor, scale: float
    ) -> Tensor:
        index_BK = index_BK.contiguous()
        call = operator("memory_similarities", impl, x_SBD)
        A_SSBK: Tensor = call(x_SBD.contiguous(), memory_SND, index_BK, scale)
        ctx.impl, ctx.scale = impl, scale
        # Autograd raises if the memory has changed before the backward.
        ctx.save_for_backward(memory_SND, index_BK)
        return A_SSBK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SSBK: Tensor) -> tuple[Tensor | None, ...]:
        memory_SND, index_BK = ctx.saved_tensors
        call = operator("memory_similarities_backward", ctx.impl, grad_SSBK)
        dx_SBD = call(grad_SSBK.contiguous(), memory_SND, index_BK, ctx.scale)
        return None, dx_SBD, None, None, None
