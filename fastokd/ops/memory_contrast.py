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
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastokd.errors import UserError
from fastokd.ops.mutual_contrast import Contrasts, between_students, check_numbers, crosswise

# Added to the denominators of the noise-contrastive loss, as published.
EPS = 1e-7


def memory_contrast(
    embeddings_SBD: Tensor,
    memory_SND: Tensor,
    index_BK: Tensor,
    *,
    positives: int = 1,
    tau: float = 0.07,
    temperature: float = 3.0,
) -> Contrasts:
    """MCL's contrasts with rows of the memory (the equations of this module), in plain torch.

    Args:
        embeddings_SBD: of length 1 along D, with gradient.
        memory_SND: the embeddings of all N images by each student, without gradient.
        index_BK: int64 rows of the memory: the sample's own, ``positives`` of its class, others.
        positives: P, at least 1.
        tau: divides the similarities; a finite number above 0.
        temperature: T; a finite number above 0.

    Raises:
        UserError: shapes or numbers that don't fit.
    """
    tau, temperature = check_numbers(tau, temperature)
    if not 1 <= positives < index_BK.shape[-1] - 1:
        raise UserError(
            f"positives is {positives}, but a sample has {index_BK.shape[-1]} rows, its own among them: "
            "choose at least 1, and fewer than the others"
        )
    A_SSBK = similarities(embeddings_SBD, memory_SND, index_BK, tau)
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
    embeddings_SBD: Tensor, memory_SND: Tensor, index_BK: Tensor, *, tau: float = 0.1
) -> Tensor:
    """MCL-OKD's noise-contrastive loss (the equation of this module), 0-d; arguments as above."""
    tau, _ = check_numbers(tau, 1.0)
    A_SSBK = similarities(embeddings_SBD, memory_SND, index_BK, tau)
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
    embeddings_SBD: Tensor, memory_SND: Tensor, index_BK: Tensor, tau: float
) -> Tensor:
    """A, ``[S, S, B, K]``, in float32 or float64. Gathers ``[B, K, D]`` for each student's memory.

    Raises:
        UserError: shapes that don't fit.
    """
    S, B, D = embeddings_SBD.shape
    if memory_SND.dim() != 3 or memory_SND.shape[::2] != (S, D) or index_BK.shape[:-1] != (B,):
        raise UserError(
            f"embeddings_SBD, memory_SND and index_BK have shapes {list(embeddings_SBD.shape)}, "
            f"{list(memory_SND.shape)} and {list(index_BK.shape)}: they must be [students, batch, width], "
            "[students, images, width] and [batch, rows]"
        )
    dtype = torch.promote_types(embeddings_SBD.dtype, torch.float32)
    with torch.autocast(embeddings_SBD.device.type, enabled=False):
        x_SBD = embeddings_SBD.to(dtype)
        columns = []
        for memory_ND in memory_SND.detach():
            rows_BKD = memory_ND.index_select(0, index_BK.flatten()).view(B, -1, D).to(dtype)
            columns.append(torch.einsum("aid,ikd->aik", x_SBD, rows_BKD))
        return torch.stack(columns, dim=1) / tau
