"""KD, and OKDDip with a teacher: T^2 KL to a frozen network is added."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastokd.reference.baseline import ReferenceIndependent
from fastokd.reference.common import (
    ReferenceCohort,
    ReferenceLosses,
    ReferenceOutputs,
    summed,
)
from fastokd.reference.okddip import ReferenceOKDDip


class _Taught(ReferenceCohort):
    """Students with a teacher in eval mode, which isn't part of their state. Of ``x_VBCHW`` it reads the last
    images."""

    def set_teacher(self, teacher: nn.Module) -> None:
        """Sets the frozen network, ``[B, 3, H, W] -> [B, C]``."""
        self._teacher = [teacher.eval()]

    def outputs(self, x_BCHW: Tensor) -> ReferenceOutputs:
        with_views = x_BCHW.dim() == 5
        with torch.no_grad():
            self.teacher_BC: Tensor = self._teacher[0](x_BCHW[-1] if with_views else x_BCHW)
        return super().outputs(x_BCHW[:-1] if with_views else x_BCHW)

    def taught(self, out: ReferenceOutputs, labels_B: Tensor) -> list[Tensor]:
        """T^2 KL(teacher || student), or another ``divergence``, of every student, without a ramp."""
        return [
            self.divergence(z_BC, self.teacher_BC, labels_B, self.temperature)
            for z_BC in out.logits
        ]


class ReferenceKD(_Taught, ReferenceIndependent):
    """Eq. 4."""

    def losses(self, out: ReferenceOutputs, labels_B: Tensor, kd_weight: float) -> ReferenceLosses:
        ce = self.cross_entropies(out, labels_B)
        kd = self.taught(out, labels_B)
        return ReferenceLosses(summed(ce) + summed(kd), ce, kd)


class ReferenceOKDDipKD(_Taught, ReferenceOKDDip):
    """Eq. 8, and T^2 KL to the teacher for every student; ``kd_weight`` multiplies only Eq. 8's KLs."""

    def losses(self, out: ReferenceOutputs, labels_B: Tensor, kd_weight: float) -> ReferenceLosses:
        group = super().losses(out, labels_B, kd_weight)
        taught = self.taught(out, labels_B)
        return group._replace(total=group.total + summed(taught))
