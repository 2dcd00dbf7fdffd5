"""KD (Hinton et al., 2015): a student learns from labels and from a trained, frozen teacher.

Scores: the teacher is one extra source, and each student listens to it alone (Eq. 4 of OKDDip,
without a ramp).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fastokd.cohort import CohortOutput, CohortShape
from fastokd.methods.base import Progress, no_one
from fastokd.methods.scored import ScoredMethod


def only_the_teacher(students: int) -> Tensor:
    """``[S, S + 1]`` scores: each student listens to the last source alone."""
    return F.pad(no_one(students), (0, 1))


def teacher_logits(out: CohortOutput) -> Tensor:
    """The frozen teacher's logits, ``[1, B, C]``."""
    assert out.extra_logits_EBC is not None, "the cohort was built without its teacher"
    return out.extra_logits_EBC


class KD(ScoredMethod):
    """CE + T^2 KL(teacher || student)."""

    needs = replace(ScoredMethod.needs, sharing=("network", "branch"), min_students=1, teacher=True)
    ramped = False

    scores_SN: Tensor

    def __init__(self, shape: CohortShape, **options: Any) -> None:
        super().__init__(shape, **options)
        self.register_buffer("scores_SN", only_the_teacher(shape.students), persistent=False)

    def scores(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> Tensor:
        return self.scores_SN

    def extras(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> Tensor:
        return teacher_logits(out)

    def term_apart(
        self,
        logits_SBC: Tensor,
        extra_EBC: Tensor | None,
        scores: Tensor,
        labels_B: Tensor,
        weight: Tensor | float,
    ) -> tuple[Tensor, Tensor]:
        assert extra_EBC is not None
        inputs = (logits_SBC, extra_EBC, labels_B, self.temperature)
        return self.divergence.to_target(*inputs, weight)
