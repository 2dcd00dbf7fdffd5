"""KDCL (Guo et al., CVPR 2020): one target for all students, made of their logits.

Scores: naive: for each sample the student with the lowest cross-entropy alone; linear: the log of
the weights of the convex combination of logits with the lowest cross-entropy; min-logit and general:
one computed extra source alone. Targets are detached. The paper augments the images separately for each
student: the recipe's ``views="student"``. By default all students get the same augmented images.

Where a batch's labels are mixed, which the paper doesn't have, the true class's logit is the mean of both
classes' by their shares: a cross-entropy is log sum exp of the logits less it, as with one label. Targets
ignore label smoothing and class weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastokd.cohort import Cohort, CohortOutput, CohortShape
from fastokd.errors import UserError
from fastokd.methods.base import Progress
from fastokd.methods.kd import only_the_teacher
from fastokd.methods.kdcl_targets import (
    covariance_weights,
    error_covariance,
    linear_scores,
    min_logits,
    naive_scores,
    weighted_logits,
)
from fastokd.methods.scored import ScoredMethod

Target = Literal["naive", "linear", "min_logit", "general"]


class KDCL(ScoredMethod):
    """CE + w T^2 KL(softmax(target / T) || student); published with w = 1 throughout.

    Args:
        target: ``"naive"``, ``"linear"``, ``"min_logit"`` or ``"general"``. The last weighs the
            students' logits by the inverse of their error covariance on held-out images, renewed
            after each epoch (uniform before the first).
        linear_steps: exponentiated-gradient steps of ``"linear"``.
        options: those of :class:`ScoredMethod`; targets are detached by default.
    """

    needs = replace(ScoredMethod.needs, sharing=("network", "branch"))

    scores_SN: Tensor
    weights_S: Tensor

    def __init__(
        self,
        shape: CohortShape,
        *,
        target: Target = "min_logit",
        linear_steps: int = 100,
        detach_targets: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(shape, detach_targets=detach_targets, **options)
        if target not in ("naive", "linear", "min_logit", "general"):
            raise UserError(f"target is {target!r}: choose naive, linear, min_logit or general")
        self.target = target
        self.linear_steps = linear_steps
        self.needs = replace(self.needs, heldout=target == "general")
        scores_SN = only_the_teacher(shape.students)
        self.register_buffer("scores_SN", scores_SN, persistent=False)
        uniform_S = torch.full((shape.students,), 1.0 / shape.students)
        self.register_buffer("weights_S", uniform_S, persistent=target == "general")

    def scores(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> Tensor:
        logits_SBC, mixed_with = out.logits_SBC.detach(), progress.mixed_with
        if self.target == "naive":
            return naive_scores(logits_SBC, labels_B, mixed_with)
        if self.target == "linear":
            return linear_scores(logits_SBC, labels_B, self.linear_steps, mixed_with)
        return self.scores_SN

    def extras(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> Tensor | None:
        logits_SBC = out.logits_SBC.detach()
        if self.target == "min_logit":
            return min_logits(logits_SBC, labels_B, progress.mixed_with)[None]
        if self.target == "general":
            return weighted_logits(self.weights_S, logits_SBC)[None]
        return None

    @torch.no_grad()
    def end_epoch(self, cohort: Cohort, heldout: tuple[Tensor, Tensor] | None) -> None:
        if self.target != "general":
            return
        if heldout is None:
            raise UserError(
                "kdcl's general target weighs the students on held-out images, but none are held "
                "out: set val (--val 5000), or choose another target"
            )
        self.weights_S.copy_(covariance_weights(error_covariance(cohort, *heldout)))
