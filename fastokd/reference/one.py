"""ONE: branches, and their gate-weighted ensemble as the target of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.reference.common import (
    ReferenceCohort,
    ReferenceLosses,
    ReferenceOutputs,
    kl_divergence,
    summed,
)


class ReferenceONE(ReferenceCohort):
    """CE of each branch and of the ensemble + w T^2 KL of each branch to the ensemble.

    ``control`` and ``norm`` are the gate on the pooled trunk.
    """

    detach = False

    def __init__(
        self,
        model: str | Sequence[str],
        num_classes: int,
        students: int = 4,
        sharing: str = "branch",
    ) -> None:
        super().__init__(model, num_classes, students, sharing)
        # A branch begins with a convolution, or a norm and a convolution, of the trunk's channels.
        first = next(m for m in self.students.modules() if isinstance(m, nn.Conv2d))
        self.control = nn.Linear(first.in_channels, students)
        self.norm = nn.BatchNorm1d(students)

    def ensemble(self, out: ReferenceOutputs) -> Tensor:
        """The weighted sum of the branches' logits."""
        assert out.trunk_BCHW is not None
        pooled_BC = F.adaptive_avg_pool2d(out.trunk_BCHW, 1).flatten(1)
        gate_BS = F.softmax(F.relu(self.norm(self.control(pooled_BC))), dim=1)
        ensemble_BC = torch.zeros_like(out.logits[0])
        for index, logits_BC in enumerate(out.logits):
            ensemble_BC = ensemble_BC + gate_BS[:, index : index + 1] * logits_BC
        return ensemble_BC

    def losses(self, out: ReferenceOutputs, labels_B: Tensor, kd_weight: float) -> ReferenceLosses:
        ensemble_BC = self.ensemble(out)
        target_BC = ensemble_BC.detach() if self.detach else ensemble_BC
        ce = self.cross_entropies(out, labels_B)
        kd = [kl_divergence(logits_BC, target_BC, self.temperature) for logits_BC in out.logits]
        ensemble_ce = self.label_loss(ensemble_BC, labels_B)
        total = summed(ce) + ensemble_ce + kd_weight * summed(kd)
        return ReferenceLosses(total, ce, kd)
