"""Learning from labels alone: one network, or branches that share a trunk."""

from __future__ import annotations

from torch import Tensor

from fastokd.cohort.output import CohortOutput, CohortShape
from fastokd.methods.base import Method, MethodLoss, Needs, Progress, no_one
from fastokd.ops import mixture_distillation


class Independent(Method):
    """*Ind*: every branch learns from labels only, and all train the trunk. Scores: -inf."""

    needs = Needs(min_students=1)

    scores_SN: Tensor

    def __init__(self, shape: CohortShape, *, impl: str = "auto") -> None:
        super().__init__(shape)
        self.impl = impl
        self.register_buffer("scores_SN", no_one(shape.students), persistent=False)

    def forward(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> MethodLoss:
        del progress
        loss = mixture_distillation(
            out.logits_SBC, labels_B, self.scores_SN, kd_weight=0.0, impl=self.impl
        )
        return MethodLoss(loss.total, {"ce_S": loss.ce_S})


class Baseline(Independent):
    """One network that learns from labels only."""

    needs = Needs(sharing=("network",), min_students=1)

    def __init__(self, shape: CohortShape, *, impl: str = "auto") -> None:
        super().__init__(shape, impl=impl)
