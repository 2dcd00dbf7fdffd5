"""KDCL: targets are computed sample by sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.reference.common import (
    ReferenceCohort,
    ReferenceLosses,
    ReferenceOutputs,
    kl_divergence,
    summed,
)

Shares = dict[int, float]
"""A sample's classes, one or two where labels are mixed, with their shares."""


class ReferenceKDCL(ReferenceCohort):
    """CE + w T^2 KL(softmax(target / T) || student); the target is detached."""

    apart = True
    target = "min_logit"
    linear_steps = 100

    weights: list[float] | None = None
    mixed_with: tuple[Tensor, Tensor] | None = None

    def losses(self, out: ReferenceOutputs, labels_B: Tensor, kd_weight: float) -> ReferenceLosses:
        logits_SBC = torch.stack(out.logits).detach()
        if self.target == "general":
            weights = self.weights or [1 / len(logits_SBC)] * len(logits_SBC)
            target_BC = summed([w * z_BC for w, z_BC in zip(weights, logits_SBC, strict=True)])
        else:
            rows = [
                self.find(logits_SBC[:, b], self.shares(labels_B, b)) for b in range(len(labels_B))
            ]
            target_BC = torch.stack(rows)
        ce = self.cross_entropies(out, labels_B)
        kd = [kl_divergence(logits_BC, target_BC, self.temperature) for logits_BC in out.logits]
        return ReferenceLosses(summed(ce) + kd_weight * summed(kd), ce, kd)

    def shares(self, labels_B: Tensor, b: int) -> Shares:
        """The classes of one sample."""
        label = int(labels_B[b])
        if self.mixed_with is None:
            return {label: 1.0}
        label2, share2 = int(self.mixed_with[0][b]), float(self.mixed_with[1][b])
        return {label: 1.0} if label == label2 else {label: 1 - share2, label2: share2}

    def find(self, logits_SC: Tensor, shares: Shares) -> Tensor:
        """One sample's target."""
        if self.target == "naive":
            return best(logits_SC, shares)
        if self.target == "linear":
            return best_mixture(logits_SC, shares, self.linear_steps)
        return least(logits_SC, shares)

    @torch.no_grad()
    def weigh(self, x_NCHW: Tensor, labels_N: Tensor) -> None:
        """The general target's weights, from held-out images: C^-1 1 / (1^T C^-1 1)."""
        self.eval()
        errors = [
            F.softmax(logits_NC, dim=1) - F.one_hot(labels_N, logits_NC.shape[1])
            for logits_NC in self.outputs(x_NCHW).logits
        ]
        self.train()
        covariance = torch.tensor(
            [[float((a * b).sum(1).mean()) for b in errors] for a in errors], dtype=torch.float64
        )
        covariance += 1e-6 * covariance.diagonal().mean() * torch.eye(len(errors))
        solved = torch.linalg.inv(covariance).sum(1)
        self.weights = (solved / solved.sum()).tolist()


def true_logit(logits_C: Tensor, shares: Shares) -> Tensor:
    """The logit of the true class, or the mean of several by their shares."""
    return summed([share * logits_C[label] for label, share in shares.items()])


def cross_entropy(logits_C: Tensor, shares: Shares) -> float:
    """CE of one sample."""
    return float(torch.logsumexp(logits_C, 0) - true_logit(logits_C, shares))


def best(logits_SC: Tensor, shares: Shares) -> Tensor:
    """The logits of the student with the lowest CE."""
    losses = [cross_entropy(logits_C, shares) for logits_C in logits_SC]
    return logits_SC[losses.index(min(losses))]


def least(logits_SC: Tensor, shares: Shares) -> Tensor:
    """The smallest of the students' logits, each less its own of the true class."""
    return (
        torch.stack([logits_C - true_logit(logits_C, shares) for logits_C in logits_SC])
        .min(0)
        .values
    )


def best_mixture(logits_SC: Tensor, shares: Shares, steps: int) -> Tensor:
    """The convex combination of logits with the lowest CE, by exponentiated gradient."""
    relative_SC = torch.stack([logits_C - true_logit(logits_C, shares) for logits_C in logits_SC])

    def gradient(a_S: Tensor) -> Tensor:
        return relative_SC @ torch.softmax(a_S @ relative_SC, 0)

    a_S = torch.full((len(relative_SC),), 1 / len(relative_SC), dtype=relative_SC.dtype)
    log_a_S = a_S.log()
    eta = 1 / max(float(relative_SC.max() - relative_SC.min()), 1e-3)
    for _ in range(steps):
        log_next_S = torch.log_softmax(log_a_S - eta * gradient(log_a_S.exp()), 0)
        moved_S = log_next_S.exp() - log_a_S.exp()
        curved = float(moved_S @ (gradient(log_next_S.exp()) - gradient(log_a_S.exp())))
        fitting = float(moved_S @ (log_next_S - log_a_S)) / curved if curved > 0 else math.inf
        before = cross_entropy(log_a_S.exp() @ relative_SC, shares)
        if cross_entropy(log_next_S.exp() @ relative_SC, shares) <= before:
            log_a_S = log_next_S
            eta = min(fitting, 10 * eta)
        else:
            eta = min(fitting, eta / 2)
        eta = min(max(eta, 1e-8), 1e8)
    return log_a_S.exp() @ logits_SC
