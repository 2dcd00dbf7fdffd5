"""CL-ILR: branches learn from the others, and the trunk's gradient is divided by their number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastokd.reference.common import (
    ReferenceCohort,
    ReferenceLosses,
    ReferenceOutputs,
    kl_divergence,
    mean_of_others,
    summed,
)


class ReferenceCLILR(ReferenceCohort):
    """CE + w T^2 KL to the mean of the others' logits."""

    def losses(self, out: ReferenceOutputs, labels_B: Tensor, kd_weight: float) -> ReferenceLosses:
        ce = self.cross_entropies(out, labels_B)
        kd = [
            kl_divergence(logits_BC, mean_of_others(out.logits, index), self.temperature)
            for index, logits_BC in enumerate(out.logits)
        ]
        return ReferenceLosses(summed(ce) + kd_weight * summed(kd), ce, kd)

    def step(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        x_BCHW: Tensor,
        labels_B: Tensor,
        kd_weight: float = 1.0,
    ) -> ReferenceLosses:
        """The branches' backward to the trunk's output, then the trunk's with the divided gradient."""
        trunk_BCHW = self.run_trunk(x_BCHW)
        entry_BCHW = trunk_BCHW.detach().requires_grad_()
        losses = self.losses(self.branch_outputs(entry_BCHW, entry_BCHW), labels_B, kd_weight)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.total.backward()
        assert entry_BCHW.grad is not None
        trunk_BCHW.backward(entry_BCHW.grad / len(self.students))
        for optimizer in optimizers:
            optimizer.step()
        return losses
