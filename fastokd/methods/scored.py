"""Methods that are one call of ``mixture_distillation``: they compute its scores."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastokd.cohort import CohortOutput, CohortShape
from fastokd.methods.base import Method, MethodLoss, Progress
from fastokd.ops.fused_loss import Mix, check_mix
from fastokd.ops.mixture_distillation import mixture_distillation


class ScoredMethod(Method):
    """CE of every student and T^2 KL to the target that its row of scores mixes.

    A subclass defines :meth:`scores`; one with sources beside the students also :meth:`extras`.

    Args:
        temperature: T.
        mix: ``"logits"``, ``"probs"`` or ``"pairwise"``: what is mixed.
        detach_targets: keeps the targets, scores included, out of the gradient.
        kd_weight: multiplies every KL, as does the recipe's ramp where the method has one.
    """

    # False for DML and KD, which are published without a ramp.
    ramped = True

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
        check_mix(mix)
        self.temperature = temperature
        self.mix: Mix = mix
        self.detach_targets = detach_targets
        self.kd_weight = kd_weight
        self.impl = impl

    def scores(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> Tensor:
        """Who listens to whom, ``[S, N]`` or ``[B, S, N]``; -inf: not at all."""
        raise NotImplementedError

    def extras(self, out: CohortOutput, labels_B: Tensor) -> Tensor | None:
        """Sources beside the students, ``[E, B, C]``."""
        del out, labels_B
        return None

    def mixture_ce_weight(self) -> Tensor | float:
        """The weight of the mixtures' own cross-entropy, for each student."""
        return 0.0

    def settings(self, progress: Progress) -> dict[str, Any]:
        """The loss's arguments beside its scores and sources."""
        return {
            "kd_weight": progress.ramp * self.kd_weight if self.ramped else self.kd_weight,
            "temperature": self.temperature,
            "mix": self.mix,
            "detach_targets": self.detach_targets,
            "impl": self.impl,
        }

    def forward(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> MethodLoss:
        loss = mixture_distillation(
            out.logits_SBC,
            labels_B,
            self.scores(out, labels_B, progress),
            extra_logits_EBC=self.extras(out, labels_B),
            mixture_ce_weight=self.mixture_ce_weight(),
            **self.settings(progress),
        )
        return MethodLoss(loss.total, {"ce_S": loss.ce_S, "kd_S": loss.kd_S})


class Mutual(ScoredMethod):
    """Each student listens to all others equally: 0 off the diagonal, -inf on it."""

    scores_SS: Tensor

    def __init__(self, shape: CohortShape, **options: Any) -> None:
        super().__init__(shape, **options)
        scores_SS = torch.zeros(shape.students, shape.students).fill_diagonal_(-math.inf)
        self.register_buffer("scores_SS", scores_SS, persistent=False)

    def scores(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> Tensor:
        return self.scores_SS
