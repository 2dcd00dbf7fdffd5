"""Ind: branches trained on labels alone. Scores: every row is -inf.

The gradient into the shared trunk is the sum of theirs, undivided.
"""

from __future__ import annotations

from torch import Tensor

from fastokd.cohort import CohortOutput, CohortShape
from fastokd.methods.base import Method, MethodLoss, Needs, Progress, no_one
from fastokd.ops.mixture_distillation import mixture_distillation


class Independent(Method):
    """CE of every student."""

    needs = Needs(sharing=("branch", "network"), min_students=1, label_loss=True, mixed_labels=True)

    scores_SS: Tensor

    def __init__(self, shape: CohortShape, *, impl: str = "auto") -> None:
        super().__init__(shape)
        self.impl = impl
        self.register_buffer("scores_SS", no_one(shape.students), persistent=False)

    def forward(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> MethodLoss:
        loss = mixture_distillation(
            out.logits_SBC,
            labels_B,
            self.scores_SS,
            kd_weight=0.0,
            impl=self.impl,
            **self.label_loss.arguments(labels_B, progress.mixed_with),
        )
        total, ce_S = self.label_loss.losses(loss, out.logits_SBC, labels_B, progress.mixed_with)
        return MethodLoss(total, {"ce_S": ce_S})
