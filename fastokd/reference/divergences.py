"""DKD, DIST and the KL of standardised logits, as their papers state them, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.reference.common import (
    ReferenceLosses,
    ReferenceOutputs,
    kl_divergence,
    summed,
)
from fastokd.reference.kd import ReferenceKD


def decoupled(
    student_BC: Tensor,
    target_BC: Tensor,
    labels_B: Tensor,
    temperature: float,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """alpha TCKD + beta NCKD, T^2 included."""
    terms = []
    for student_C, target_C, label in zip(student_BC, target_BC.detach(), labels_B, strict=True):
        z_C, t_C = student_C / temperature, target_C / temperature
        others = torch.arange(len(z_C), device=labels_B.device) != label
        rest, t_rest = z_C[others], t_C[others]
        binary = torch.stack([z_C[label], rest.logsumexp(0)])
        t_binary = torch.stack([t_C[label], t_rest.logsumexp(0)])
        terms.append(alpha * _kl(t_binary, binary) + beta * _kl(t_rest, rest))
    return torch.stack(terms).mean() * temperature**2


def _kl(target: Tensor, student: Tensor) -> Tensor:
    log_q, log_p = student.log_softmax(0), target.log_softmax(0)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def correlated(
    student_BC: Tensor,
    target_BC: Tensor,
    labels_B: Tensor,
    temperature: float,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> Tensor:
    """beta inter + gamma intra, T^2 included."""
    del labels_B
    y_BC = F.softmax(student_BC / temperature, dim=1)
    u_BC = F.softmax(target_BC.detach() / temperature, dim=1)
    inter, intra = 1.0 - _pearson(y_BC, u_BC), 1.0 - _pearson(y_BC.T, u_BC.T)
    return temperature**2 * (beta * inter + gamma * intra)


def _pearson(a_NM: Tensor, b_NM: Tensor) -> Tensor:
    """The mean over rows of their correlation, 1e-8 added to the product of norms."""
    rows = []
    for row_a, row_b in zip(a_NM, b_NM, strict=True):
        a_M, b_M = row_a - row_a.mean(), row_b - row_b.mean()
        rows.append(a_M @ b_M / (a_M.norm() * b_M.norm() + 1e-8))
    return torch.stack(rows).mean()


def standardised_kl(
    student_BC: Tensor, target_BC: Tensor, labels_B: Tensor, temperature: float
) -> Tensor:
    """T^2 KL of each sample's logits less their mean, over their deviation + 1e-7."""
    del labels_B
    z, t = (
        torch.stack([(x_C - x_C.mean()) / (x_C.std() + 1e-7) for x_C in x_BC])
        for x_BC in (student_BC, target_BC.detach())
    )
    return kl_divergence(z, t, temperature)


class ReferenceDKD(ReferenceKD):
    """CE + min((epoch + 1) / warmup, 1) (alpha TCKD + beta NCKD); ``epoch`` from 0."""

    temperature = 4.0
    epoch, warmup = 0.0, 20.0
    divergence = staticmethod(decoupled)

    def losses(self, out: ReferenceOutputs, labels_B: Tensor, kd_weight: float) -> ReferenceLosses:
        ce, kd = self.cross_entropies(out, labels_B), self.taught(out, labels_B)
        warm = min((self.epoch + 1) / self.warmup, 1.0)
        return ReferenceLosses(summed(ce) + warm * summed(kd), ce, kd)


class ReferenceDIST(ReferenceKD):
    """CE + 2 (inter + intra)."""

    temperature = 1.0
    divergence = staticmethod(correlated)

    def losses(self, out: ReferenceOutputs, labels_B: Tensor, kd_weight: float) -> ReferenceLosses:
        ce, kd = self.cross_entropies(out, labels_B), self.taught(out, labels_B)
        return ReferenceLosses(summed(ce) + 2.0 * summed(kd), ce, kd)
