"""DML (Zhang et al., CVPR 2018), as OKDDip compares with it: everybody learns from all the others.

Scores: 0 off the diagonal, -inf on it. The target is the mean of the others' logits
(``mix="logits"``), or each other student in turn (``mix="pairwise"``: the KLs divided by S - 1).
All students are updated together; the authors' one network after another is another program.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastokd.cohort.output import CohortOutput, CohortShape
from fastokd.methods.base import Needs, Progress
from fastokd.methods.scored import ScoredMethod, everyone_else


class DML(ScoredMethod):
    """CE + T^2 KL(softmax(mean of the others' logits / T) || student), without a ramp.

    ``mix="pairwise", detach_targets=True`` is FFSD's form; with ``temperature=1`` Zhang et al.'s.
    """

    needs = Needs(sharing=("network", "branch"))
    ramped = False

    scores_SS: Tensor

    def __init__(self, shape: CohortShape, **options: Any) -> None:
        super().__init__(shape, **options)
        self.register_buffer("scores_SS", everyone_else(shape.students), persistent=False)

    def scores(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> Tensor:
        return self.scores_SS
