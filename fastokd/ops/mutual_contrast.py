"""The four contrasts of MCL (Yang, An, Xu, AAAI 2022) over a batch.

For students a, b and samples i, k of one batch, with normalised embeddings e:

    A_ab[i, k] = e_a[i] . e_b[k] / tau
    L(A)       = mean_i mean_{k != i, y_k = y_i} (log sum_{l != i} exp A[i, l] - A[i, k])
    vcl        = sum_a L(A_aa)
    icl        = sum_{a != b} L(A_ab)
    soft_vcl   = T^2 sum_{a != b} KL(A_bb || A_aa)        softmax(A / T) of whole rows, the diagonal too
    soft_icl   = T^2 sum_{a != b} KL(A_ba || A_ab)

The KLs' first arguments are targets, without gradient. An anchor i whose label no other sample of the batch
has is left out of the mean of L; the published code gives NaN.

It has no kernel of its own: A is [S, S, B, B], 4 MB at S 4 and B 256.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastokd.errors import UserError
from fastokd.ops.dispatch import choose


class Contrasts(NamedTuple):
    """The terms, 0-d and without weights. soft_vcl and soft_icl hold their T^2."""

    vcl: Tensor
    soft_vcl: Tensor
    icl: Tensor
    soft_icl: Tensor


def mutual_contrast(
    embeddings_SBD: Tensor,
    labels_B: Tensor,
    *,
    tau: float = 0.1,
    temperature: float = 3.0,
    impl: str = "auto",
) -> Contrasts:
    """The contrasts between the samples of a batch (the equations of this module).

    Args:
        embeddings_SBD: floating point, of length 1 along D. All get gradient, as anchors and as contrasts.
        labels_B: class ids.
        tau: divides the similarities; a finite number above 0.
        temperature: T of the soft terms; a finite number above 0.
        impl: ``"auto"`` or ``"torch"``.

    Returns:
        ``Contrasts(vcl, soft_vcl, icl, soft_icl)``, in float32 or float64.

    Raises:
        UserError: shapes, dtypes or numbers that don't fit, or another ``impl``.
    """
    given = embeddings_SBD.shape
    if len(given) != 3 or not embeddings_SBD.is_floating_point() or not given[0] * given[2]:
        raise UserError(
            f"embeddings_SBD is {embeddings_SBD.dtype} of shape {list(given)}: it must be floating "
            "point, [students, batch, width], of a student and a number at least"
        )
    if labels_B.shape != given[1:2] or labels_B.is_floating_point():
        raise UserError(
            f"labels_B is {labels_B.dtype} of shape {list(labels_B.shape)}: it must be integers "
            f"[{given[1]}]"
        )
    tau, temperature = check_numbers(tau, temperature)
    if impl in ("cpp", "triton"):
        raise UserError(
            f"mutual_contrast can't run as impl={impl!r}: its similarities are a few megabytes, which "
            "plain torch serves; impl='auto' would run"
        )
    choose("mutual_contrast", impl, embeddings_SBD.device, {})
    dtype = torch.promote_types(embeddings_SBD.dtype, torch.float32)
    with torch.autocast(embeddings_SBD.device.type, enabled=False):
        return _contrasts(embeddings_SBD.to(dtype), labels_B, tau, temperature)


def check_numbers(tau: float, temperature: float) -> tuple[float, float]:
    """Both as floats; raises UserError unless they are finite and above 0."""
    for name, value in (("tau", tau), ("temperature", temperature)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name} is {value}: it must be a finite number above 0")
    return float(tau), float(temperature)


def _contrasts(e_SBD: Tensor, labels_B: Tensor, tau: float, temperature: float) -> Contrasts:
    B = e_SBD.shape[1]
    if B < 2:  # there is nothing to contrast with
        nothing = e_SBD.sum() * 0.0
        return Contrasts(nothing, nothing, nothing, nothing)
    A_SSBB = torch.einsum("aid,bkd->abik", e_SBD, e_SBD) / tau
    itself_BB = torch.eye(B, dtype=torch.bool, device=e_SBD.device)
    positive_BB = (labels_B[:, None] == labels_B) & ~itself_BB
    norm_SSB = A_SSBB.masked_fill(itself_BB, -math.inf).logsumexp(-1)
    count_B = positive_BB.sum(1)
    counts_B = count_B > 0
    anchors = counts_B.sum().clamp_min(1)
    anchor_B = counts_B / anchors.to(A_SSBB.dtype)
    pair_BB = positive_BB / (count_B.clamp_min(1) * anchors).to(A_SSBB.dtype)[:, None]
    loss_SS = torch.einsum("abi,i->ab", norm_SSB, anchor_B)
    loss_SS = loss_SS - torch.einsum("abik,ik->ab", A_SSBB, pair_BB)
    log_p_SSBB = (A_SSBB / temperature).log_softmax(-1)
    vcl = loss_SS.diagonal().sum()
    return Contrasts(
        vcl,
        temperature**2 * between_students(log_p_SSBB.diagonal().movedim(-1, 0)),
        loss_SS.sum() - vcl,
        temperature**2 * crosswise(log_p_SSBB),
    )


def between_students(log_p_SBK: Tensor) -> Tensor:
    """sum_{a != b} KL(p_b || p_a), the mean over rows, p_b without gradient."""
    log_t_SBK = log_p_SBK.detach()
    kl_SSBK = log_t_SBK.exp() * (log_t_SBK - log_p_SBK[:, None])
    return kl_SSBK.sum() / log_p_SBK.shape[1]


def crosswise(log_p_SSBK: Tensor) -> Tensor:
    """sum_{a != b} KL(p_ba || p_ab), the mean over rows, p_ba without gradient."""
    log_t_SSBK = log_p_SSBK.detach().transpose(0, 1)
    # Where a is b, target and student are the same: the term and its gradient are 0.
    return (log_t_SSBK.exp() * (log_t_SSBK - log_p_SSBK)).sum() / log_p_SSBK.shape[2]
