"""MCL: networks whose embeddings are contrasted over the batch, one pair of networks after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastokd.models import Student
from fastokd.reference.common import (
    ReferenceCohort,
    ReferenceLosses,
    ReferenceOutputs,
    kl_divergence,
    summed,
)


def supervised(similarity_BB: Tensor, labels_B: Tensor) -> Tensor:
    """Each anchor's positives against all other samples; anchors without a positive are left out."""
    itself_BB = torch.eye(len(labels_B), dtype=torch.bool, device=labels_B.device)
    positive_BB = (labels_B[:, None] == labels_B[None, :]) & ~itself_BB
    others_BB = similarity_BB.masked_fill(itself_BB, -torch.inf)
    log_p_BB = similarity_BB - others_BB.logsumexp(1, keepdim=True)
    count_B = positive_BB.sum(1)
    loss_B = -(positive_BB * log_p_BB).sum(1) / count_B.clamp(min=1)
    return (loss_B * (count_B > 0)).sum() / (count_B > 0).sum().clamp(min=1)


def contrasts(
    embeddings: list[Tensor], labels_B: Tensor, tau: float, temperature: float
) -> dict[str, Tensor]:
    """VCL, soft VCL, ICL and soft ICL of a ``[B, E]`` for each student."""
    terms = {name: embeddings[0].sum() * 0.0 for name in ("vcl", "soft_vcl", "icl", "soft_icl")}
    for a, anchors_BE in enumerate(embeddings):
        own_BB = anchors_BE @ anchors_BE.T / tau
        terms["vcl"] = terms["vcl"] + supervised(own_BB, labels_B)
        for b, others_BE in enumerate(embeddings):
            if a == b:
                continue
            across_BB, back_BB = anchors_BE @ others_BE.T / tau, others_BE @ anchors_BE.T / tau
            theirs_BB = others_BE @ others_BE.T / tau
            soft_own = kl_divergence(own_BB, theirs_BB.detach(), temperature)
            soft_across = kl_divergence(across_BB, back_BB.detach(), temperature)
            terms["soft_vcl"] = terms["soft_vcl"] + soft_own
            terms["icl"] = terms["icl"] + supervised(across_BB, labels_B)
            terms["soft_icl"] = terms["soft_icl"] + soft_across
    return terms


class ReferenceMCL(ReferenceCohort):
    """CE + alpha VCL + gamma soft VCL + beta ICL + lam soft ICL, without a ramp.

    ``logit_distill`` adds T^2 KL(mean logits || student) for both of two students, else for the last alone.
    """

    tau, alpha, gamma, beta, lam = 0.1, 0.1, 1.0, 0.1, 1.0
    logit_distill = False

    def __init__(self, *args: Any, embedding_dim: int = 128, **options: Any) -> None:
        super().__init__(*args, **options)
        widths = [s.feature_dim for s in self.students if isinstance(s, Student)]
        self.embeddings = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, embedding_dim),
                nn.ReLU(),
                nn.Linear(embedding_dim, embedding_dim),
            )
            for width in widths
        )

    def losses(self, out: ReferenceOutputs, labels_B: Tensor, kd_weight: float) -> ReferenceLosses:
        ce = self.cross_entropies(out, labels_B)
        mean_BC = (summed(out.logits) / len(out.logits)).detach()
        kd = [kl_divergence(logits_BC, mean_BC, self.temperature) for logits_BC in out.logits]
        embeddings = []
        for embed, features_BD in zip(self.embeddings, out.features, strict=True):
            embedding_BE = embed(features_BD)
            embeddings.append(embedding_BE / embedding_BE.square().sum(1, keepdim=True).sqrt())
        terms = contrasts(embeddings, labels_B, self.tau, self.temperature)
        total = summed(ce) + self.alpha * terms["vcl"] + self.gamma * terms["soft_vcl"]
        total = total + self.beta * terms["icl"] + self.lam * terms["soft_icl"]
        if self.logit_distill:
            total = total + summed(kd if len(kd) == 2 else kd[-1:])
        return ReferenceLosses(total, ce, kd)
