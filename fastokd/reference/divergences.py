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
    is_label_BC = labels_B[:, None] == torch.arange(student_BC.shape[1], device=labels_B.device)
    binary, others = _parts(student_BC / temperature, is_label_BC)
    t_binary, t_others = _parts(target_BC.detach() / temperature, is_label_BC)
    tckd = F.kl_div(binary, t_binary, reduction="batchmean", log_target=True)
    nckd = F.kl_div(others, t_others, reduction="batchmean", log_target=True)
    return (alpha * tckd + beta * nckd) * temperature**2


def _parts(z_BC: Tensor, is_label_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities of the label and the rest, ``[B, 2]``, and of the others among themselves, 0 at the
    label."""
    rest_B1 = z_BC.masked_fill(is_label_BC, -torch.inf).logsumexp(1, keepdim=True)
    label_B1 = z_BC.masked_fill(~is_label_BC, 0.0).sum(1, keepdim=True)
    others_BC = (z_BC - rest_B1).masked_fill(is_label_BC, -torch.inf)
    binary_B2 = torch.cat([label_B1, rest_B1], dim=1).log_softmax(1)
    return binary_B2, others_BC.masked_fill(is_label_BC, 0.0)


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
    alpha, beta = 1.0, 8.0

    def divergence(
        self, student_BC: Tensor, target_BC: Tensor, labels_B: Tensor, temperature: float
    ) -> Tensor:
        return decoupled(student_BC, target_BC, labels_B, temperature, self.alpha, self.beta)

    def losses(self, out: ReferenceOutputs, labels_B: Tensor, kd_weight: float) -> ReferenceLosses:
        ce, kd = self.cross_entropies(out, labels_B), self.taught(out, labels_B)
        warm = min((self.epoch + 1) / self.warmup, 1.0)
        return ReferenceLosses(summed(ce) + warm * summed(kd), ce, kd)


class ReferenceDIST(ReferenceKD):
    """CE + 2 (beta inter + gamma intra)."""

    temperature = 1.0
    kd_weight, beta, gamma = 2.0, 1.0, 1.0

    def divergence(
        self, student_BC: Tensor, target_BC: Tensor, labels_B: Tensor, temperature: float
    ) -> Tensor:
        return correlated(student_BC, target_BC, labels_B, temperature, self.beta, self.gamma)

    def losses(self, out: ReferenceOutputs, labels_B: Tensor, kd_weight: float) -> ReferenceLosses:
        ce, kd = self.cross_entropies(out, labels_B), self.taught(out, labels_B)
        return ReferenceLosses(summed(ce) + self.kd_weight * summed(kd), ce, kd)
