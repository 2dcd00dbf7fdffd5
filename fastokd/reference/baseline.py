"""Baseline and Ind: training on labels alone."""

from __future__ import annotations

from torch import Tensor

from fastokd.reference.common import (
    ReferenceCohort,
    ReferenceLosses,
    ReferenceOutputs,
    summed,
)


class ReferenceIndependent(ReferenceCohort):
    """CE of each student."""

    apart = True

    def losses(self, out: ReferenceOutputs, labels_B: Tensor, kd_weight: float) -> ReferenceLosses:
        ce = self.cross_entropies(out, labels_B)
        return ReferenceLosses(summed(ce), ce, [])
