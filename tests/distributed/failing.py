"""A method that fails on the second rank, in its third step; for ``--method``."""

from __future__ import annotations

import os

from torch import Tensor

from fastokd.cohort import CohortOutput
from fastokd.errors import UserError
from fastokd.methods import MethodLoss, Progress
from fastokd.methods.dml import DML


class Failing(DML):
    steps = 0

    def forward(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> MethodLoss:
        self.steps += self.training
        if self.steps == 3 and os.environ.get("RANK") == "1":
            raise UserError("the disk of this machine is on fire")
        return super().forward(out, labels_B, progress)
