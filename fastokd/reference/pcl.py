"""PCL: two kinds of KL one after another, and a second set of networks that follows the first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastokd.models import Student
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

    def __init__(
        self, model: str, num_classes: int, students: int = 3, sharing: str = "branch"
    ) -> None:
        super().__init__(model, num_classes, students, sharing)
        width = sum(s.feature_dim for s in self.students if isinstance(s, Student))
        self.ensemble = nn.Linear(width, num_classes)
        self.steps = 0
        # Not part of the state.
        self.mean = [ReferenceCohort(model, num_classes, students, sharing)]

    def outputs(self, x_BCHW: Tensor) -> ReferenceOutputs:
        mean = self.mean[0]
        if self.steps == 0:
            own = self.state_dict()
            mean.to(x_BCHW.dtype).load_state_dict({k: own[k] for k in mean.state_dict()})
        out = super().outputs(x_BCHW)
        with torch.no_grad():
            self.means = mean.outputs(x_BCHW).logits
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

    @torch.no_grad()
    def after_step(self) -> None:
        d = min(1 - 1 / (self.steps + 1), self.decay)
        new = dict(self.named_parameters())
        for name, mean in self.mean[0].named_parameters():
            mean.copy_(d * mean + (1 - d) * new[name])
        self.steps += 1
