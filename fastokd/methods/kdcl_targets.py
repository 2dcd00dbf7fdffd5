"""KDCL's targets. Every function takes detached logits, and none reads values on the host."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.cohort import Cohort
from fastokd.methods.label_loss import Mixed

HELD_OUT_BATCH = 512


def naive_scores(logits_SBC: Tensor, labels_B: Tensor, mixed_with: Mixed = None) -> Tensor:
    """``[B, S, S]``: for each sample all listen to the student with the lowest CE alone."""
    S, B = logits_SBC.shape[:2]
    if mixed_with is None:
        labels_SB = labels_B.expand(S, B)
        ce_SB = F.cross_entropy(
            logits_SBC.flatten(0, 1).to(at_least_fp32(logits_SBC)),
            labels_SB.reshape(-1),
            reduction="none",
        ).view(S, B)
    else:
        ce_SB = relative_logits(logits_SBC, labels_B, mixed_with).logsumexp(2)
    others_BS = torch.arange(S, device=ce_SB.device) != ce_SB.argmin(0)[:, None]
    scores_BS = torch.zeros_like(others_BS, dtype=ce_SB.dtype).masked_fill(others_BS, -math.inf)
    return scores_BS[:, None].expand(-1, S, -1)


def weighted_logits(weights_S: Tensor, logits_SBC: Tensor) -> Tensor:
    """``[B, C]``: sum of w_s z_s. Weights may be negative, so scores can't express it."""
    dtype = at_least_fp32(logits_SBC)
    with torch.autocast(logits_SBC.device.type, enabled=False):
        return torch.tensordot(weights_S.to(dtype), logits_SBC.to(dtype), dims=1)


def min_logits(logits_SBC: Tensor, labels_B: Tensor, mixed_with: Mixed = None) -> Tensor:
    """``[B, C]``: each student's logits less its true class's, the smallest over students."""
    return relative_logits(logits_SBC, labels_B, mixed_with).amin(0)


def relative_logits(logits_SBC: Tensor, labels_B: Tensor, mixed_with: Mixed = None) -> Tensor:
    """The logits less the true class's, ``[S, B, C]``, in fp32 at least; softmax is the same.

    ``mixed_with``: the true class's logit is the mean of two classes' by their shares.
    """
    logits_SBC = logits_SBC.to(at_least_fp32(logits_SBC))
    index_SB1 = labels_B.expand(logits_SBC.shape[:2])[..., None]
    true_SB1 = logits_SBC.gather(2, index_SB1)
    if mixed_with is not None:
        labels2_B, share2_B = mixed_with
        second_SB1 = logits_SBC.gather(2, labels2_B.expand(logits_SBC.shape[:2])[..., None])
        true_SB1 = torch.lerp(true_SB1, second_SB1, share2_B.to(true_SB1.dtype)[:, None])
    return logits_SBC - true_SB1


def linear_scores(
    logits_SBC: Tensor, labels_B: Tensor, steps: int, mixed_with: Mixed = None
) -> Tensor:
    """``[B, S, S]``: the log of the convex weights whose mixed logits have the lowest CE.

    Exponentiated gradient, a <- softmax(log a - eta g) with g = dCE / da, for all samples at once and
    without a host sync: a step that doesn't descend is undone and eta halved; after one that does,
    eta is Barzilai and Borwein's. CE is convex in a.
    """
    with torch.autocast(logits_SBC.device.type, enabled=False):
        return _solve(relative_logits(logits_SBC, labels_B, mixed_with), steps)


def _solve(relative_SBC: Tensor, steps: int) -> Tensor:
    """:func:`linear_scores` in the dtype that it is given."""
    dtype = relative_SBC.dtype
    relative_BSC = relative_SBC.permute(1, 0, 2).contiguous()

    def ce_and_gradient(log_a_BS: Tensor) -> tuple[Tensor, Tensor]:
        mixed_BC = torch.einsum("bs,bsc->bc", log_a_BS.exp(), relative_BSC)
        ce_B1 = torch.logsumexp(mixed_BC, dim=1, keepdim=True)
        return ce_B1, torch.einsum("bc,bsc->bs", (mixed_BC - ce_B1).exp(), relative_BSC)

    spread_B1 = (relative_BSC.amax((1, 2)) - relative_BSC.amin((1, 2)))[:, None]
    tiny = torch.finfo(dtype).tiny
    eta_B1 = 1.0 / spread_B1.clamp_min(1e-3)
    log_a_BS = torch.full_like(relative_BSC[..., 0], -math.log(relative_BSC.shape[1]))
    ce_B1, gradient_BS = ce_and_gradient(log_a_BS)
    for _ in range(steps):
        log_next_BS = F.log_softmax(log_a_BS - eta_B1 * gradient_BS, dim=1)
        next_ce_B1, next_gradient_BS = ce_and_gradient(log_next_BS)
        moved_BS = log_next_BS.exp() - log_a_BS.exp()
        along_B1 = (moved_BS * (log_next_BS - log_a_BS)).sum(1, keepdim=True)
        curved_B1 = (moved_BS * (next_gradient_BS - gradient_BS)).sum(1, keepdim=True)
        fitting_B1 = along_B1 / curved_B1.clamp_min(tiny)
        descends_B1 = next_ce_B1 <= ce_B1
        eta_B1 = torch.minimum(fitting_B1, eta_B1 * torch.where(descends_B1, 10.0, 0.5))
        eta_B1 = eta_B1.clamp(1e-8, 1e8)
        log_a_BS = torch.where(descends_B1, log_next_BS, log_a_BS)
        ce_B1 = torch.where(descends_B1, next_ce_B1, ce_B1)
        gradient_BS = torch.where(descends_B1, next_gradient_BS, gradient_BS)
    return log_a_BS[:, None].expand(-1, relative_BSC.shape[1], -1)


def error_covariance(cohort: Cohort, images_NHWC: Tensor, labels_N: Tensor) -> Tensor:
    """``[S, S]``: the mean over samples of the inner products of the students' errors.

    An error is softmax(z) - onehot(label), in eval mode, in float64. As in Perrone and Cooper, it isn't
    centred.
    """
    was_training = cohort.training
    cohort.eval()
    products_SS: Tensor | None = None
    try:
        for start in range(0, len(labels_N), HELD_OUT_BATCH):
            labels_B = labels_N[start : start + HELD_OUT_BATCH]
            logits_SBC = cohort(images_NHWC[start : start + HELD_OUT_BATCH]).logits_SBC.double()
            error_SBC = logits_SBC.softmax(2) - F.one_hot(labels_B, logits_SBC.shape[2])
            batch_SS = torch.einsum("sbc,tbc->st", error_SBC, error_SBC)
            products_SS = batch_SS if products_SS is None else products_SS + batch_SS
    finally:
        cohort.train(was_training)
    assert products_SS is not None
    return products_SS / len(labels_N)


def covariance_weights(covariance_SS: Tensor) -> Tensor:
    """w = C^-1 1 / (1^T C^-1 1): they sum to 1 and may be negative.

    A millionth of C's mean diagonal keeps it invertible where students are alike.
    """
    ridge = covariance_SS.diagonal().mean() * 1e-6 + torch.finfo(covariance_SS.dtype).tiny
    eye_SS = torch.eye(len(covariance_SS), dtype=covariance_SS.dtype, device=covariance_SS.device)
    # solve_ex doesn't check the solver's error code, which would be a host sync.
    ones_S = torch.ones_like(eye_SS[0])
    solved_S = torch.linalg.solve_ex(covariance_SS + ridge * eye_SS, ones_S).result
    return solved_S / solved_S.sum()


def at_least_fp32(x: Tensor) -> torch.dtype:
    """The dtype of sums over classes."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
