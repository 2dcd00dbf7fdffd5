"""CL-ILR (Song and Chai, NeurIPS 2018): branches learn from the others and share their gradient.

Scores: 0 off the diagonal, -inf on it. What is its own is the gradient into the shared trunk,
which the cohort divides by the number of branches (``needs.divide_trunk_gradient``).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastokd.cohort.output import CohortOutput, CohortShape
from fastokd.methods.base import Needs, Progress
from fastokd.methods.scored import ScoredMethod, everyone_else


class CLILR(ScoredMethod):
    """CE + w T^2 KL(softmax(mean of the others' logits / T) || student), w the recipe's ramp."""

    needs = Needs(sharing=("branch",), divide_trunk_gradient=True)

    scores_SS: Tensor

    def __init__(self, shape: CohortShape, **options: Any) -> None:
        super().__init__(shape, **options)
        self.register_buffer("scores_SS", everyone_else(shape.students), persistent=False)

    def scores(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> Tensor:
        return self.scores_SS
