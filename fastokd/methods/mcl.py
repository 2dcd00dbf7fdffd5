"""MCL (Yang, An and Xu, AAAI 2022): students contrast their embeddings of the batch with each other's.

Each student has an embedding, Linear -> ReLU -> Linear of its pooled feature, normalised, which is trained
with it and dropped after. The contrasts are ``ops/mutual_contrast.py``'s.

Scores, for ``logit_distill``: 0 for all students, itself included, whose mean logits are the target of both
of two students, else of the last student alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.cohort import CohortOutput, CohortShape
from fastokd.methods.base import MethodLoss, Progress
from fastokd.methods.scored import ScoredMethod
from fastokd.ops.mutual_contrast import check_numbers, mutual_contrast


class MCL(ScoredMethod):
    """CE + alpha VCL + gamma soft VCL + beta ICL + lam soft ICL, and the logit term, without a ramp.

    Args:
        alpha: weighs VCL, each student's contrast with itself.
        gamma: weighs soft VCL, which makes the students' similarities alike.
        beta: weighs ICL, the contrast of each student with each other one.
        lam: weighs soft ICL, which makes the contrasts of two students alike in both directions.
        tau: divides the similarities.
        temperature: T of the soft terms and of the logit term.
        embedding_dim: width of the embeddings and of their hidden layer.
        logit_distill: adds T^2 KL(mean logits || student).
        detach_targets: keeps the logit term's target out of the gradient; contrasts detach theirs always.
    """

    needs = replace(ScoredMethod.needs, mixed_labels=False)
    ramped = False

    scores_SS: Tensor
    listens_S: Tensor

    def __init__(
        self,
        shape: CohortShape,
        *,
        alpha: float = 0.1,
        gamma: float = 1.0,
        beta: float = 0.1,
        lam: float = 1.0,
        tau: float = 0.1,
        temperature: float = 3.0,
        embedding_dim: int = 128,
        logit_distill: bool = False,
        detach_targets: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            shape, temperature=temperature, detach_targets=detach_targets, **options
        )
        check_numbers(tau, temperature)
        self.alpha, self.gamma, self.beta, self.lam = alpha, gamma, beta, lam
        self.tau = tau
        S = shape.students
        self.embeddings = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, embedding_dim),
                nn.ReLU(),
                nn.Linear(embedding_dim, embedding_dim),
            )
            for width in shape.feature_dims
        )
        listens_S = torch.zeros(S)
        listens_S[0 if S == 2 else S - 1 :] = float(logit_distill)
        self.register_buffer("listens_S", listens_S, persistent=False)
        self.register_buffer("scores_SS", torch.zeros(S, S), persistent=False)

    def scores(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> Tensor:
        return self.scores_SS

    def settings(self, progress: Progress) -> dict[str, Any]:
        settings = super().settings(progress)
        return settings | {"kd_weight": self.listens_S * settings["kd_weight"]}

    def embedded(self, out: CohortOutput) -> Tensor:
        """The students' embeddings, of length 1, ``[S, B, E]``, in float32 or float64."""
        pairs = zip(self.embeddings, out.features, strict=True)
        embeddings_SBE = torch.stack([embed(features_BD) for embed, features_BD in pairs])
        x_SBE = embeddings_SBE.to(torch.promote_types(embeddings_SBE.dtype, torch.float32))
        return x_SBE / x_SBE.norm(dim=-1, keepdim=True)

    def forward(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> MethodLoss:
        loss = super().forward(out, labels_B, progress)
        terms = mutual_contrast(
            self.embedded(out), labels_B, tau=self.tau, temperature=self.temperature
        )
        total = loss.total + self.alpha * terms.vcl + self.gamma * terms.soft_vcl
        total = total + self.beta * terms.icl + self.lam * terms.soft_icl
        named = {name: term.detach() for name, term in terms._asdict().items()}
        return MethodLoss(total, {**loss.parts, **named})
