"""ONE (Lan, Zhu and Gong, NeurIPS 2018): branches learn from their gate-weighted ensemble.

Scores: the gate's logits in every row, g = ReLU(BatchNorm(Linear(avgpool(trunk)))). The ensemble
sum_b softmax(g)_b z_b has a cross-entropy too, which counts once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.cohort import CohortOutput, CohortShape
from fastokd.errors import UserError
from fastokd.methods.base import Progress
from fastokd.methods.scored import ScoredMethod


class ONE(ScoredMethod):
    """CE of branches and ensemble + w T^2 KL(ensemble || branch), w the recipe's ramp.

    The gradient runs through the KL's target, as OKDDip's authors have it;
    ``detach_targets=True`` stops it, as Lan et al. do. The ensemble's cross-entropy trains branches
    and gate in both.
    """

    needs = replace(ScoredMethod.needs, sharing=("branch",), trunk=True, min_batch=2)

    once_S: Tensor

    def __init__(self, shape: CohortShape, **options: Any) -> None:
        super().__init__(shape, **options)
        assert shape.trunk_channels is not None
        self.control = nn.Linear(shape.trunk_channels, shape.students)
        self.norm = nn.BatchNorm1d(shape.students)
        once_S = F.one_hot(torch.tensor(0), shape.students).float()
        self.register_buffer("once_S", once_S, persistent=False)

    def gate(self, out: CohortOutput) -> Tensor:
        """The gate's logits, ``[B, S]``."""
        assert out.trunk_BCHW is not None
        if self.training and out.trunk_BCHW.shape[0] == 1:
            raise UserError(
                "a batch holds one image, over which ONE's gate can't normalise: choose a batch "
                "size that leaves no last batch of one"
            )
        return F.relu(self.norm(self.control(out.trunk_BCHW.mean((2, 3)))))

    def scores(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> Tensor:
        return self.gate(out)[:, None].expand(-1, self.shape.students, -1)

    def mixture_ce_weight(self) -> Tensor:
        return self.once_S

    def diagnostics(self, out: CohortOutput) -> dict[str, Tensor]:
        gate_S = self.gate(out).float().softmax(1).mean(0)
        return {"attention": gate_S.expand(self.shape.students, -1)}
