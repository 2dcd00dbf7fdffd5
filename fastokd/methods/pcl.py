"""PCL (Wu and Gong, AAAI 2021): peers learn from an ensemble classifier and from each other's means.

    e      = W [h_0, ..., h_S-1] + b              over pooled features side by side, peer 0 first
    m_j    = logits of peer j of the mean model, on the view of peer j
    total  = CE(e) + sum_s CE(z_s) + w T^2 KL(e || z_s) + w T^2 / (S - 1) sum_{j != s} KL(m_j || z_s)

Targets are detached: e learns from its cross-entropy alone, which trains the peers and the trunk, too. The
mean model is a copy of trunk, peers and ensemble classifier whose parameters are after each step

    mean <- d mean + (1 - d) parameter,   d = min(1 - 1 / (g + 1), decay),   g the step from 0

It runs in training mode without gradient on the same images, so its norms' statistics are its own.

One call of the loss: rows are the peers and e, which listens to nothing; extra sources are the m_j.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.cohort import Cohort, CohortOutput, CohortShape
from fastokd.cohort.companion import Companion, by_dtype, companion_logits, floats
from fastokd.errors import UserError
from fastokd.methods.base import Method, MethodLoss, Needs, Progress
from fastokd.models import Student
from fastokd.ops.mixture_distillation import mixture_distillation

RAMPS = ("recipe", "published_code")
# Up to this epoch the published code's ramp has its fault.
PUBLISHED_R = 80


class MeanModel(Companion):
    """The mean of trunk, peers and ensemble classifier over the steps; a copy of them at first.

    Attributes:
        ensemble: the mean ensemble classifier.
        steps: 0-d int64, g.
    """

    steps: Tensor

    def __init__(self, cohort: Any, ensemble: nn.Linear, decay: float) -> None:
        super().__init__(cohort, len(cohort.students))
        self.ensemble = copy.deepcopy(ensemble).requires_grad_(False)
        self.decay = decay
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def renew(self, cohort: Cohort) -> Iterator[tuple[list[Tensor], ...]]:
        theirs = floats(cohort.state_dict())
        ours = floats(self.networks.state_dict())
        pairs = [(ours[name], theirs[name]) for name in theirs]
        yield from by_dtype(*map(list, zip(*pairs, strict=True)))

    def update(self, cohort: Cohort, ensemble: nn.Linear) -> None:
        """After a step: parameters only."""
        share = (1 - 1 / (self.steps.double() + 1)).clamp(max=self.decay)
        live = [p.detach() for part in (cohort, ensemble) for p in part.parameters()]
        means = [p for part in (self.networks, self.ensemble) for p in part.parameters()]
        for mean, new in by_dtype(means, live):
            d = share.to(mean[0].dtype)
            torch._foreach_mul_(mean, d)
            torch._foreach_add_(mean, torch._foreach_mul(new, 1 - d))
        self.steps.add_(1)


class PCL(Method):
    """The equations of this module; w is the recipe's ramp times ``kd_weight``.

    Args:
        temperature: T.
        kd_weight: multiplies every KL.
        decay: the largest d; 0 keeps a copy of the peers as the mean model.
        ramp: ``"recipe"``, or ``"published_code"``: w = exp(-5 (1 - t)^2) up to epoch t = 80, from 0, and
            1 from then on, as the published code divides t by 1.
        equal_heads: a run begins with the first peer's classifier in all peers, as published for ResNets.

    The mean model attaches itself to the cohort of ``shape`` (``companion.py``). Beside the loss,
    ``out`` needs ``features`` and ``companion_logits_EBC``, the m_j.

    Raises:
        UserError: a ``ramp`` that isn't one, a ``decay`` above 1.
    """

    needs = Needs(sharing=("branch",), companion="each", label_loss=True, mixed_labels=True)

    scores_RN: Tensor

    def __init__(
        self,
        shape: CohortShape,
        *,
        temperature: float = 3.0,
        kd_weight: float = 1.0,
        decay: float = 0.999,
        ramp: str = "recipe",
        equal_heads: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__(shape)
        if ramp not in RAMPS:
            raise UserError(f"ramp is {ramp!r}: choose {' or '.join(RAMPS)}")
        if not 0 <= decay <= 1:
            raise UserError(f"decay is {decay}: it must be at most 1, such as 0.999")
        self.temperature, self.kd_weight, self.ramp, self.impl = temperature, kd_weight, ramp, impl
        self.equal_heads = equal_heads
        self.ensemble = nn.Linear(sum(shape.feature_dims), shape.num_classes)
        S = shape.students
        # Peers, e, then the means: 0 where a peer listens.
        scores_RN = torch.full((S + 1, 2 * S + 1), -math.inf)
        scores_RN[:S, S] = 0.0
        scores_RN[:S, S + 1 :] = torch.zeros(S, S).fill_diagonal_(-math.inf)
        self.register_buffer("scores_RN", scores_RN, persistent=False)
        self.companion: MeanModel | None = None
        if shape.cohort is not None:
            self.companion = MeanModel(shape.cohort, self.ensemble, decay)

    @torch.no_grad()
    def begin(self, cohort: Cohort) -> None:
        if self.equal_heads:
            students = [one for one in cohort.students if isinstance(one, Student)]
            first, *others = [student.head_parameters() for student in students]
            for head in others:
                for theirs, ours in zip(head, first, strict=True):
                    theirs.copy_(ours)

    def weight(self, progress: Progress) -> Tensor:
        """w, 0-d."""
        if self.ramp == "recipe":
            return progress.ramp * self.kd_weight
        epoch = progress.epoch.to(progress.ramp.dtype)
        w = torch.where(epoch <= PUBLISHED_R, (-5.0 * (1.0 - epoch) ** 2).exp(), 1.0)
        return w * self.kd_weight

    def ensemble_logits(self, out: CohortOutput) -> Tensor:
        """e, ``[B, C]``."""
        e_BC: Tensor = self.ensemble(torch.cat(out.features, dim=1))
        return e_BC

    def forward(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> MethodLoss:
        means_SBC = companion_logits(out, "pcl")
        S = self.shape.students
        e_BC = self.ensemble_logits(out)
        logits_RBC = torch.cat([out.logits_SBC, e_BC[None].to(out.logits_SBC.dtype)])
        # Half of a peer's weight is on e: as much as on the S - 1 means together.
        dtype = torch.promote_types(logits_RBC.dtype, torch.float32)
        scores_RN = self.scores_RN.to(dtype)
        scores_RN = torch.cat(
            [scores_RN[:, : S + 1] + math.log(max(S - 1, 1)), scores_RN[:, S + 1 :]], dim=1
        )
        loss = mixture_distillation(
            logits_RBC,
            labels_B,
            scores_RN,
            extra_logits_EBC=means_SBC,
            kd_weight=2.0 * self.weight(progress),
            temperature=self.temperature,
            mix="pairwise",
            detach_targets=True,
            impl=self.impl,
            **self.label_loss.arguments(labels_B, progress.mixed_with),
        )
        total, ce_R = self.label_loss.losses(loss, logits_RBC, labels_B, progress.mixed_with)
        # The KLs of both kinds: twice the mean that the op's weights make.
        return MethodLoss(
            total, {"ce_S": ce_R[:S], "kd_S": 2.0 * loss.kd_S[:S], "ensemble_ce": ce_R[S]}
        )

    def after_step(self, cohort: Cohort, progress: Progress) -> None:
        if self.companion is not None:
            self.companion.update(cohort, self.ensemble)

    def classifiers(self, out: CohortOutput) -> dict[str, Tensor]:
        return {"ensemble_classifier": self.ensemble_logits(out)}
