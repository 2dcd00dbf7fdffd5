"""A method whose loss takes mixed labels, in torch's own operations; and recipes that mix."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fastokd.cohort import CohortOutput, CohortShape
from fastokd.methods import MethodLoss, Progress, register_method
from fastokd.methods.base import Method, Needs
from fastokd.recipe.names import Recipe, recipe

NAME = "tests.run.mixed:MixedCE"


class MixedCE(Method):
    """Cross-entropy of each student with both labels of each image."""

    needs = Needs(min_students=1, mixed_labels=True)

    def __init__(self, shape: CohortShape, *, impl: str = "auto") -> None:
        del impl
        super().__init__(shape)

    def forward(self, out: CohortOutput, labels_B: Tensor, progress: Progress) -> MethodLoss:
        assert progress.mixed_with is not None
        labels2_B, share2_B = progress.mixed_with
        logits_SBC = out.logits_SBC
        logits_BCS = logits_SBC.permute(1, 2, 0)
        labels_BS, labels2_BS = (
            labels[:, None].expand(-1, len(logits_SBC)) for labels in (labels_B, labels2_B)
        )
        one_BS = F.cross_entropy(logits_BCS, labels_BS, reduction="none")
        two_BS = F.cross_entropy(logits_BCS, labels2_BS, reduction="none")
        share_B1 = share2_B.to(one_BS.dtype)[:, None]
        ce_S = ((1 - share_B1) * one_BS + share_B1 * two_BS).mean(0)
        return MethodLoss(ce_S.sum(), {"ce_S": ce_S.detach()})


def mixed_recipe(name: str = "baseline/resnet8/digits", **changes: Any) -> Recipe:
    """A recipe of :class:`MixedCE` that mixes by both ways."""
    register_method(NAME)
    return recipe(name, method=NAME, **{"mixup": 0.4, "cutmix": 1.0, **changes})
