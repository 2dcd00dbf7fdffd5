"""OKDPH: a network with the mean weights is loaded before each step, and pulls the students after some."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from fastokd.models import create_model
from fastokd.reference.common import (
    ReferenceCohort,
    ReferenceLosses,
    ReferenceOutputs,
    kl_divergence,
    summed,
)


class ReferenceOKDPH(ReferenceCohort):
    """omega CE + beta T^2 KL to the mean of the students' and the hybrid's logits.

    ``shares``: the hybrid's weights, None for equal ones. ``hybrid_gradient``: the hybrid is a function of
    the students' weights, and (1 - omega) CE of it is added.
    """

    temperature = 4.0
    omega, beta, gamma = 1.0, 0.5, 1.0
    fusion, gap = "batch", 5
    shares: list[float] | None = None
    hybrid_gradient = False

    def __init__(
        self, model: str, num_classes: int, students: int = 2, sharing: str = "network"
    ) -> None:
        super().__init__(model, num_classes, students, sharing)
        self._hybrid = [create_model(model, num_classes)]  # not part of the state
        self.batch = self.epoch = 0

    @property
    def network(self) -> torch.nn.Module:
        return self._hybrid[0]

    def outputs(self, x_BCHW: Tensor) -> ReferenceOutputs:
        """Of ``x_VBCHW`` the hybrid reads the last images."""
        shares = self.shares or [1 / len(self.students)] * len(self.students)
        states = [student.state_dict() for student in self.students]
        mean = {
            key: summed([r * state[key] for r, state in zip(shares, states, strict=True)])
            for key in states[0]
        }
        self.network.to(next(self.parameters()).dtype).load_state_dict(mean)
        with_views = x_BCHW.dim() == 5
        out = super().outputs(x_BCHW[:-1] if with_views else x_BCHW)
        x_BCHW = x_BCHW[-1] if with_views else x_BCHW
        if self.hybrid_gradient:
            each = [dict(student.named_parameters()) for student in self.students]
            weights = {
                name: summed([r * own[name] for r, own in zip(shares, each, strict=True)])
                for name in each[0]
            }
            self.hybrid_BC: Tensor = functional_call(self.network, weights, (x_BCHW,))
        else:
            with torch.no_grad():
                self.hybrid_BC = self.network(x_BCHW)
        return out

    def losses(self, out: ReferenceOutputs, labels_B: Tensor, kd_weight: float) -> ReferenceLosses:
        logits = [*out.logits, self.hybrid_BC]
        target_BC = (summed(logits) / len(logits)).detach()
        ce = self.cross_entropies(out, labels_B)
        kd = [kl_divergence(z_BC, target_BC, self.temperature) for z_BC in out.logits]
        total = self.omega * summed(ce) + self.beta * summed(kd)
        if self.hybrid_gradient:
            total = total + (1 - self.omega) * self.label_loss(self.hybrid_BC, labels_B)
        return ReferenceLosses(total, ce, kd)

    def after_step(self) -> None:
        if self.fusion == "batch" and self.batch % self.gap == 0:
            self.fuse()
        self.batch += 1

    def end_epoch(self) -> None:
        """After an epoch's last step."""
        if self.fusion == "epoch" and self.epoch % self.gap == 0:
            self.fuse()
        self.epoch, self.batch = self.epoch + 1, 0

    @torch.no_grad()
    def fuse(self) -> None:
        """theta_s = gamma H + (1 - gamma) theta_s, running statistics included."""
        hybrid = self.network.state_dict()
        for student in self.students:
            for key, value in student.state_dict().items():
                if value.is_floating_point():
                    value.copy_(self.gamma * hybrid[key] + (1 - self.gamma) * value)
