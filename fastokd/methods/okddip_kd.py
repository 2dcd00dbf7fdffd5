"""OKDDip with a teacher (Table 6): OKDDip's loss, and a second one whose only source is the teacher.

Scores: OKDDip's; then the teacher's column alone, without cross-entropy and without a ramp (the
papers' KD has none; the paper doesn't say so for this combination).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from fastokd.cohort import CohortOutput, CohortShape
from fastokd.methods.base import MethodLoss, Progress
from fastokd.methods.divergence import Divergence, DivergenceName
from fastokd.methods.kd import only_the_teacher, teacher_logits
from fastokd.methods.okddip import OKDDip
from fastokd.ops.mixture_distillation import mixture_distillation


class OKDDipKD(OKDDip):
    """Eq. 8 + T^2 KL(teacher || student) of every student, the leader included.

    Args:
        teacher_weight: multiplies the teacher's terms.
        divergence: of the teacher's terms alone: ``"kl"``, ``"dkd"`` or ``"dist"``.
        alpha: DKD's weight of TCKD, 1 by default.
        beta: DKD's weight of NCKD, 8 by default; DIST's of inter, 1.
        gamma: DIST's weight of intra, 1 by default.
        standardise_logits: the z-scores of student's and teacher's logits are compared.
        options: those of :class:`OKDDip`.
    """

    needs = replace(OKDDip.needs, teacher=True)

    teacher_scores_SN: Tensor

    def __init__(
        self,
        shape: CohortShape,
        *,
        teacher_weight: float = 1.0,
        divergence: DivergenceName = "kl",
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        standardise_logits: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(shape, **options)
        self.teacher_weight = teacher_weight
        self.teacher_divergence = Divergence(
            divergence,
            standardise=standardise_logits,
            impl=self.impl,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
        )
        scores_SN = only_the_teacher(shape.students)
        self.register_buffer("teacher_scores_SN", scores_SN, persistent=False)

    def forward(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> MethodLoss:
        group = super().forward(out, labels_B, progress)
        teacher_1BC = teacher_logits(out)
        if not self.teacher_divergence.fused:
            self.teacher_divergence.check_labels(progress.mixed_with)
            inputs = (out.logits_SBC, teacher_1BC, labels_B, self.temperature, self.teacher_weight)
            total, kd_S = self.teacher_divergence.to_target(*inputs)
            return MethodLoss(group.total + total, {**group.parts, "teacher_kd_S": kd_S})
        taught = mixture_distillation(
            out.logits_SBC,
            labels_B,
            self.teacher_scores_SN,
            extra_logits_EBC=teacher_1BC,
            mixed_with=progress.mixed_with,
            ce_weight=0.0,
            kd_weight=self.teacher_weight,
            temperature=self.temperature,
            impl=self.impl,
        )
        return MethodLoss(group.total + taught.total, {**group.parts, "teacher_kd_S": taught.kd_S})
