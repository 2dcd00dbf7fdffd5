"""PCL: two kinds of KL one after another, and a second set of networks that follows the first."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.reference.common import (
    ReferenceCohort,
    ReferenceLosses,
    ReferenceOutputs,
    kl_divergence,
    summed,
)


class ReferencePCL(ReferenceCohort):
    """CE of peers and ensemble classifier, w T^2 KL(e || z_s), w T^2 mean over j != s of KL(m_j || z_s)."""

    decay = 0.999

    def __init__(self, model: str, num_classes: int, students: int = 3) -> None:
        super().__init__(model, num_classes, students)
        width = sum(int(student.feature_dim) for student in self.students)  # type: ignore[arg-type]
        self.ensemble = nn.Linear(width, num_classes)
        self.steps = 0

    def start(self) -> None:
        """Copies the mean model, which isn't part of the state."""
        self.mean = [copy.deepcopy(self)]

    def outputs(self, x_BCHW: Tensor) -> ReferenceOutputs:
        out = super().outputs(x_BCHW)
        with torch.no_grad():
            self.means = ReferenceCohort.outputs(self.mean[0], x_BCHW).logits
        return out

    def losses(self, out: ReferenceOutputs, labels_B: Tensor, kd_weight: float) -> ReferenceLosses:
        e_BC = self.ensemble(torch.cat(out.features, dim=1))
        ce, kd = self.cross_entropies(out, labels_B), []
        for s, z_BC in enumerate(out.logits):
            means = [
                kl_divergence(z_BC, mean_BC, self.temperature)
                for j, mean_BC in enumerate(self.means)
                if j != s
            ]
            from_e = kl_divergence(z_BC, e_BC.detach(), self.temperature)
            kd.append(from_e + summed(means) / len(means))
        total = summed(ce) + self.label_loss(e_BC, labels_B) + kd_weight * summed(kd)
        return ReferenceLosses(total, ce, kd)

    def step(
        self, optimizers: Sequence[torch.optim.Optimizer], *args: Any, **options: Any
    ) -> ReferenceLosses:
        losses = super().step(optimizers, *args, **options)
        d = min(1 - 1 / (self.steps + 1), self.decay)
        with torch.no_grad():
            for mean, new in zip(self.mean[0].parameters(), self.parameters(), strict=True):
                mean.copy_(d * mean + (1 - d) * new)
        self.steps += 1
        return losses
