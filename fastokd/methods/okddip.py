"""OKDDip (Chen et al., AAAI 2020): peers with attention, and a leader that learns from them all.

Scores: peer a listens to peer b with (W_L h_a) . (W_E h_b) (Eq. 9 and 10), the leader to every
peer alike (Eq. 7), nobody to the leader. Nothing is detached: the projections learn through the
target side of the KL alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.cohort.output import CohortOutput, CohortShape
from fastokd.errors import UserError
from fastokd.methods.base import Method, MethodLoss, Needs, Progress
from fastokd.ops import mixture_distillation
from fastokd.ops.mixture_distillation import Mix


class OKDDip(Method):
    """Eq. 8: CE of every student, T^2 KL of each peer to its own mixture, of the leader to all.

    Args:
        temperature: T.
        mix: ``"logits"`` as published in code, ``"probs"`` as in Eq. 5.
        detach_targets: stops the gradient into the targets; the projections then never learn.
        kd_weight: multiplies both KL terms beside the recipe's ramp.
    """

    needs = Needs(min_students=2, leader=True)

    def __init__(
        self,
        shape: CohortShape,
        *,
        temperature: float = 3.0,
        mix: Mix = "logits",
        detach_targets: bool = False,
        kd_weight: float = 1.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(shape)
        width = shape.feature_dims[0]
        if len(set(shape.feature_dims)) > 1:
            raise UserError(
                f"the students' features are {shape.feature_dims} wide, but OKDDip's projections "
                "are shared: use students of one width"
            )
        if width < 8:
            raise UserError(f"features of width {width} can't be projected to width // 8")
        self.temperature = temperature
        self.mix: Mix = mix
        self.detach_targets = detach_targets
        self.kd_weight = kd_weight
        self.impl = impl
        self.query = nn.Linear(width, width // 8, bias=False)
        self.key = nn.Linear(width, width // 8, bias=False)

    def scores(self, out: CohortOutput) -> Tensor:
        """Who listens to whom, ``[B, S, S]``."""
        features_BPD = torch.stack(out.features[: self.peers], dim=1)
        scores_BPP = self.query(features_BPD) @ self.key(features_BPD).mT
        scores_BSP = F.pad(scores_BPP, (0, 0, 0, 1))
        return F.pad(scores_BSP, (0, 1), value=-math.inf)

    def forward(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> MethodLoss:
        loss = mixture_distillation(
            out.logits_SBC,
            labels_B,
            self.scores(out),
            kd_weight=progress.ramp * self.kd_weight,
            temperature=self.temperature,
            mix=self.mix,
            detach_targets=self.detach_targets,
            impl=self.impl,
        )
        return MethodLoss(loss.total, {"ce_S": loss.ce_S, "kd_S": loss.kd_S})

    def diagnostics(self, out: CohortOutput) -> dict[str, Tensor]:
        return {"attention": self.scores(out).float().softmax(-1).mean(0)}
