"""OKDPH (Zhang et al., CVPR 2023): students learn with a hybrid of their weights, and are fused with it.

    H      = sum_s r_s theta_s                      before every step, all entries, running statistics too
    m      = (z_0 + ... + z_S-1 + z_H) / (S + 1)    logits of the students and of H, detached
    total  = sum_s omega CE(z_s) + beta T^2 KL(m || z_s)
    theta_s <- gamma H + (1 - gamma) theta_s        fusion, running statistics too; momenta stay

H is a companion in training mode, on a view of its own. The published loss adds (1 - omega) CE(z_H) to each
student, but H is a copy of the weights, so that this is a constant for the students: here it is reported.

One call of the loss: rows are the students and H, which listens to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor

from fastokd.cohort import Cohort, CohortOutput, CohortShape
from fastokd.cohort.companion import Companion, by_dtype, companion_logits, floats
from fastokd.errors import UserError
from fastokd.methods.base import Method, MethodLoss, Needs, Progress
from fastokd.ops.mixture_distillation import mixture_distillation

# The name of a step's drawn weights; each row is the same.
DRAWN = "hybrid_BS"


class Hybrid(Companion):
    """H: the students' weighted mean.

    Attributes:
        weights_S: r, of any sum.
        gradient: H's parameters have the gradient of that mean.
        batch, epoch: 0-d int64, of the next step: which of them end with a fusion.
    """

    weights_S: Tensor
    batch: Tensor
    epoch: Tensor

    def __init__(self, cohort: Any, *, gradient: bool) -> None:
        super().__init__(cohort, 1, own_view=True)
        self.gradient = gradient
        self.register_buffer("weights_S", torch.ones(len(cohort.students)))
        self.register_buffer("batch", torch.zeros((), dtype=torch.int64))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def shares(self, dtype: torch.dtype) -> Tensor:
        """r, ``[S]``."""
        weights_S = self.weights_S.to(dtype)
        return weights_S / weights_S.sum()

    def renew(self, cohort: Cohort) -> Iterator[tuple[list[Tensor], ...]]:
        for written, *students in self._entries(cohort):
            shares = self.shares(written[0].dtype).unbind()
            values = torch._foreach_mul(students[0], shares[0])
            for theirs, share in zip(students[1:], shares[1:], strict=True):
                torch._foreach_add_(values, torch._foreach_mul(theirs, share))
            yield written, list(values)

    def fuse(self, cohort: Cohort, gamma: float, due: Tensor) -> None:
        """theta_s <- gamma H + (1 - gamma) theta_s where the 0-d ``due`` isn't 0."""
        for ours, *students in self._entries(cohort):
            share = due.to(ours[0].dtype) * gamma
            pulled = torch._foreach_mul(ours, share)
            for theirs in students:
                torch._foreach_mul_(theirs, 1 - share)
                torch._foreach_add_(theirs, pulled)

    def _entries(self, cohort: Cohort) -> Iterator[tuple[list[Tensor], ...]]:
        """H's floating-point entries and each student's."""
        ours = floats(self.networks.students[0].state_dict())
        states = [floats(student.state_dict()) for student in cohort.students]
        yield from by_dtype(*([state[name] for name in ours] for state in (ours, *states)))

    def forward(self, cohort: Cohort, images: Tensor) -> Tensor:
        if not self.gradient:
            return super().forward(cohort, images)
        shares = self.shares(cohort.scale_C.dtype).unbind()
        students = [dict(student.named_parameters()) for student in cohort.students]
        mixed = {}
        for name in students[0]:
            parts = [
                share.to(student[name].dtype) * student[name]
                for share, student in zip(shares, students, strict=True)
            ]
            mixed[f"students.0.{name}"] = torch.stack(parts).sum(0)
        output: CohortOutput = torch.func.functional_call(self.networks, mixed, (images,))
        return output.logits_SBC


class OKDPH(Method):
    """The equations of this module.

    Args:
        temperature: T.
        omega: in [0, 1], the weight of a student's cross-entropy.
        beta: the weight of the KL.
        gamma: in [0, 1], H's share in a fusion.
        fusion: ``"batch"``: after the steps of batches 0, ``gap``, 2 ``gap``, ... of an epoch, with the H
            from before the step; ``"epoch"``: after epochs 0, ``gap``, ...; ``"none"``. The published
            code's ``"5_batch"`` is ``"batch"`` with gap 5, its ``""`` is ``"none"``.
        gap: batches or epochs from one fusion to the next.
        hybrid: ``"mean"``: r_s = 1 / S; ``"dirichlet"``: r ~ Dir(1, ..., 1), drawn for each step.
        hybrid_gradient: (1 - omega) CE(z_H) is added once, and its gradient with respect to H's weights
            goes to the students', r_s of it to student s.
        diff_init: a run begins with students of different weights; else all have the first one's.

    H attaches itself to the cohort of ``shape`` (``companion.py``). Call :meth:`after_step` after each
    optimizer step, and :meth:`end_epoch` after each epoch, which counts batches from 0 again.

    Raises:
        UserError: a word that isn't one of these, a number out of range, students of several kinds.
    """

    needs = Needs(
        sharing=("network",),
        companion="one",
        label_loss=True,
        mixed_labels=True,
    )

    scores_RN: Tensor
    is_hybrid_R: Tensor

    def __init__(
        self,
        shape: CohortShape,
        *,
        temperature: float = 4.0,
        omega: float = 1.0,
        beta: float = 0.5,
        gamma: float = 1.0,
        fusion: str = "batch",
        gap: int = 5,
        hybrid: str = "mean",
        hybrid_gradient: bool = False,
        diff_init: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(shape)
        every, _, level = fusion.rpartition("_")  # the published words: "", "5_batch"
        if every.isdecimal() and int(every):
            fusion, gap = level, int(every)
        fusion = fusion or "none"
        for name, word, words in (
            ("fusion", fusion, ("batch", "epoch", "none")),
            ("hybrid", hybrid, ("mean", "dirichlet")),
        ):
            if word not in words:
                raise UserError(
                    f"{name} is {word!r}: choose {', '.join(words[:-1])} or {words[-1]}"
                )
        for name, number in (("omega", omega), ("gamma", gamma)):
            if not 0 <= number <= 1:
                raise UserError(f"{name} is {number}: it must be at least 0 and at most 1")
        self.temperature, self.omega, self.beta, self.impl = temperature, omega, beta, impl
        self.gamma, self.fusion, self.gap = gamma, fusion, gap
        self.hybrid, self.hybrid_gradient, self.diff_init = hybrid, hybrid_gradient, diff_init
        S = shape.students
        scores_RN = torch.zeros(S + 1, S + 1)
        scores_RN[S] = -math.inf
        self.register_buffer("scores_RN", scores_RN, persistent=False)
        is_hybrid_R = (torch.arange(S + 1) == S).float()
        self.register_buffer("is_hybrid_R", is_hybrid_R, persistent=False)
        self.companion: Hybrid | None = None
        if shape.cohort is not None:
            _check_equal(shape.cohort)
            self.companion = Hybrid(shape.cohort, gradient=hybrid_gradient)
            if hybrid == "dirichlet":
                self.companion.weights_S.copy_(_drawn(S, None))

    def begin(self, cohort: Cohort) -> None:
        if not self.diff_init:
            first, *others = cohort.students
            for student in others:
                student.load_state_dict(first.state_dict())

    def draw(self, batch: int, generator: Generator) -> dict[str, Tensor]:
        if self.hybrid == "mean":
            return {}
        return {DRAWN: _drawn(self.shape.students, generator).float().expand(batch, -1).clone()}

    def forward(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> MethodLoss:
        S = self.shape.students
        logits_RBC = torch.cat([out.logits_SBC, companion_logits(out, "okdph")])
        of_hybrid = 1.0 - self.omega if self.hybrid_gradient else 0.0
        is_hybrid_R = self.is_hybrid_R.to(torch.promote_types(logits_RBC.dtype, torch.float32))
        weight_R = is_hybrid_R * of_hybrid + (1 - is_hybrid_R) * self.omega
        loss = mixture_distillation(
            logits_RBC,
            labels_B,
            self.scores_RN,
            kd_weight=self.beta,
            temperature=self.temperature,
            mix="logits",
            detach_targets=True,
            impl=self.impl,
            **self.label_loss.arguments(labels_B, progress.mixed_with, weight_R),
        )
        total, ce_R = self.label_loss.losses(
            loss, logits_RBC, labels_B, progress.mixed_with, weight_R
        )
        return MethodLoss(total, {"ce_S": ce_R[:S], "kd_S": loss.kd_S[:S], "hybrid_ce": ce_R[S]})

    def after_step(self, cohort: Cohort, progress: Progress) -> None:
        H = self.companion
        if H is None:
            return
        if self.fusion == "batch":
            H.fuse(cohort, self.gamma, H.batch % self.gap == 0)
        H.batch.add_(1)
        H.due.fill_(1.0)
        if self.hybrid == "dirichlet":
            if DRAWN not in progress.draws:
                raise UserError(
                    "hybrid is 'dirichlet', but progress has no draws: set progress.draws to "
                    "method.draw(B, generator) before each step"
                )
            H.weights_S.copy_(progress.draws[DRAWN][0])

    @torch.no_grad()
    def end_epoch(self, cohort: Cohort, heldout: tuple[Tensor, Tensor] | None) -> None:
        """The fusion of an epoch, with the hybrid of its last step."""
        H = self.companion
        if H is None:
            return
        if self.fusion == "epoch":
            H.fuse(cohort, self.gamma, H.epoch % self.gap == 0)
        H.batch.zero_()
        H.epoch.add_(1)


def _drawn(students: int, generator: Generator | None) -> Tensor:
    """r ~ Dir(1, ..., 1), float64: exponential draws by their sum."""
    drawn_S = -torch.rand(students, generator=generator, dtype=torch.float64).clamp_min(1e-30).log()
    return drawn_S / drawn_S.sum()


def _check_equal(cohort: Any) -> None:
    if len(set(cohort.model_names)) > 1:
        raise UserError(
            f"okdph averages the weights of its students, but {'+'.join(cohort.model_names)} differ: name "
            "one model for all"
        )
