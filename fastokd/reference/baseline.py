"""Baseline and Ind: labels alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.reference.common import ReferenceCohort, ReferenceLosses, ReferenceOutputs


class ReferenceIndependent(ReferenceCohort):
    """CE of each student; those who share nothing are trained by optimizers of their own."""

    def losses(self, out: ReferenceOutputs, labels_B: Tensor, kd_weight: float) -> ReferenceLosses:
        ce = [F.cross_entropy(logits_BC, labels_B) for logits_BC in out.logits]
        return ReferenceLosses(sum(ce[1:], ce[0]), ce, [])

    def optimizers(self, **settings: Any) -> list[torch.optim.Optimizer]:
        if self.trunk is not None:
            return super().optimizers(**settings)
        return [torch.optim.SGD(student.parameters(), **settings) for student in self.students]
