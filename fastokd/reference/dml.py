"""DML: every network learns from the others, each with an optimizer, all stepped together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastokd.reference.common import (
    ReferenceCohort,
    ReferenceLosses,
    ReferenceOutputs,
    mean_of_others,
    summed,
)


class ReferenceDML(ReferenceCohort):
    """CE + T^2 KL (or another ``divergence``) to the mean of the others' logits, or the mean of the KLs to each.

    Published without a ramp: ``kd_weight`` isn't read. Where targets are detached, each network has a
    backward of its own.
    """

    apart = True
    pairwise = False
    detach = False

    def _target(self, logits_BC: Tensor) -> Tensor:
        return logits_BC.detach() if self.detach else logits_BC

    def losses(self, out: ReferenceOutputs, labels_B: Tensor, kd_weight: float) -> ReferenceLosses:
        ce, kd = self.cross_entropies(out, labels_B), []
        for index, logits_BC in enumerate(out.logits):
            if self.pairwise:
                pairs = [
                    self.divergence(logits_BC, self._target(other_BC), labels_B, self.temperature)
                    for other, other_BC in enumerate(out.logits)
                    if other != index
                ]
                kd.append(summed(pairs) / len(pairs))
            else:
                mean_BC = self._target(mean_of_others(out.logits, index))
                kd.append(self.divergence(logits_BC, mean_BC, labels_B, self.temperature))
        return ReferenceLosses(summed(ce) + summed(kd), ce, kd)

    def step(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        x_BCHW: Tensor,
        labels_B: Tensor,
        kd_weight: float = 1.0,
    ) -> ReferenceLosses:
        if not self.detach or self.trunk is not None:
            return super().step(optimizers, x_BCHW, labels_B, kd_weight)
        losses = self.losses(self.outputs(x_BCHW), labels_B, kd_weight)
        for optimizer, ce, kd in zip(optimizers, losses.ce, losses.kd, strict=True):
            optimizer.zero_grad()
            (ce + kd).backward()
        for optimizer in optimizers:
            optimizer.step()
        return losses
