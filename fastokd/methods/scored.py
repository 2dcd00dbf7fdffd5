"""Methods that are one call of ``mixture_distillation``: they compute its scores."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastokd.cohort import CohortOutput, CohortShape
from fastokd.methods.base import Method, MethodLoss, Needs, Progress
from fastokd.methods.divergence import Divergence, DivergenceName
from fastokd.ops.fused_loss import Mix
from fastokd.ops.loss_arguments import check_mix
from fastokd.ops.mixture_distillation import mixture_distillation


class ScoredMethod(Method):
    """CE of every student and T^2 KL to the target that its row of scores mixes.

    A subclass defines :meth:`scores`; one with sources beside the students also :meth:`extras`.

    Args:
        temperature: T.
        mix: ``"logits"``, ``"probs"`` or ``"pairwise"``: what is mixed.
        detach_targets: keeps the targets, scores included, out of the gradient.
        kd_weight: multiplies every KL, as does the recipe's ramp where the method has one.
        divergence: ``"kl"``, ``"dkd"`` or ``"dist"``: what takes the KL's place. Targets of the latter two
            are mixed logits, or one of each pair, and always detached.
        alpha: DKD's weight of TCKD, 1 by default.
        beta: DKD's weight of NCKD, 8 by default; DIST's of inter, 1.
        gamma: DIST's weight of intra, 1 by default.
        standardise_logits: the z-scores of student's and target's logits are compared, also by KL; targets
            are then detached.
    """

    needs = Needs(label_loss=True, mixed_labels=True)
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
        divergence: DivergenceName = "kl",
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        standardise_logits: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(shape)
        check_mix(mix)
        self.divergence = Divergence(
            divergence,
            standardise=standardise_logits,
            mix=mix,
            impl=impl,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
        )
        self.temperature = temperature
        self.mix: Mix = mix
        self.detach_targets = detach_targets
        self.kd_weight = kd_weight
        self.impl = impl

    def scores(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> Tensor:
        """Who listens to whom, ``[S, N]`` or ``[B, S, N]``; -inf: not at all."""
        raise NotImplementedError

    def extras(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> Tensor | None:
        """Sources beside the students, ``[E, B, C]``."""
        del out, labels_B, progress
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
        scores, mixtures = self.scores(out, labels_B, progress), self.mixture_ce_weight()
        extra_EBC, settings = self.extras(out, labels_B, progress), self.settings(progress)
        apart = {} if self.divergence.fused else {"kd_weight": 0.0, "detach_targets": True}
        loss = mixture_distillation(
            out.logits_SBC,
            labels_B,
            scores,
            extra_logits_EBC=extra_EBC,
            mixture_ce_weight=self.label_loss.scaled(mixtures),
            **{**settings, **apart},
            **self.label_loss.arguments(labels_B, progress.mixed_with),
        )
        total, ce_S = self.label_loss.losses(loss, out.logits_SBC, labels_B, progress.mixed_with)
        kd_S = loss.kd_S
        if apart:
            self.divergence.check_labels(progress.mixed_with)
            weight = settings["kd_weight"]
            kd, kd_S = self.term_apart(out.logits_SBC, extra_EBC, scores, labels_B, weight)
            total = total + kd
        if self.label_loss.criterion == "bce" and isinstance(mixtures, Tensor):
            bce_S = self._mixture_bce(out.logits_SBC, scores, labels_B, progress)
            total = total + (mixtures * bce_S).sum() * self.label_loss.weight
        return MethodLoss(total, {"ce_S": ce_S, "kd_S": kd_S})

    def term_apart(
        self,
        logits_SBC: Tensor,
        extra_EBC: Tensor | None,
        scores: Tensor,
        labels_B: Tensor,
        weight: Tensor | float,
    ) -> tuple[Tensor, Tensor]:
        """The weighted distillation term and each student's, where the loss of scores hasn't got it."""
        inputs = (logits_SBC, extra_EBC, scores, labels_B, self.temperature)
        return self.divergence.by_scores(*inputs, weight)

    def _mixture_bce(
        self, logits_SBC: Tensor, scores: Tensor, labels_B: Tensor, progress: Progress
    ) -> Tensor:
        """The binary cross-entropy of each student's mixture of the students' logits, ``[S]``."""
        dtype = torch.promote_types(logits_SBC.dtype, torch.float32)
        with torch.autocast(logits_SBC.device.type, enabled=False):
            mix_BSN = scores.to(dtype).softmax(-1).expand(logits_SBC.shape[1], -1, -1)
            mixed_SBC = torch.einsum("bsn,nbc->sbc", mix_BSN, logits_SBC.to(dtype))
        return self.label_loss.binary(mixed_SBC, labels_B, progress.mixed_with)


class Mutual(ScoredMethod):
    """Each student listens to all others equally: 0 off the diagonal, -inf on it."""

    scores_SS: Tensor

    def __init__(self, shape: CohortShape, **options: Any) -> None:
        super().__init__(shape, **options)
        scores_SS = torch.zeros(shape.students, shape.students).fill_diagonal_(-math.inf)
        self.register_buffer("scores_SS", scores_SS, persistent=False)

    def scores(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> Tensor:
        return self.scores_SS
