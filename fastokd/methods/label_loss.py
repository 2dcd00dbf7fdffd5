"""What students learn from labels: the recipe's settings of the cross-entropy, the same for every method.

Cross-entropies are computed by the fused losses. Binary cross-entropies (Wightman et al., ResNet strikes
back, section 2; timm's ``BinaryCrossEntropy``) are plain torch beside a fused loss whose ``ce_weight`` is 0:

    y    = (1 - smoothing) onehot(labels) + smoothing / C, mixed labels by their shares
    y    = 1 where y > target_threshold, else 0, where there is a threshold
    bce  = mean_c -(y_c log sigmoid(z_c) + (1 - y_c) log(1 - sigmoid(z_c)))
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.ops.mixture_distillation import MixtureLoss

Criterion = Literal["ce", "bce"]
Mixed = tuple[Tensor, Tensor] | None
"""``progress.mixed_with``."""


class LabelLoss(nn.Module):
    """Settings of every term that compares logits with labels, the mixtures' and the fusion's too.

    Args:
        smoothing: of labels, in [0, 1).
        weight: multiplies each of these terms.
        criterion: ``"ce"`` or ``"bce"``.
        threshold: of smoothed and mixed targets, for ``"bce"``; 0 for none.
        class_weight_C: a weight for each class, which multiplies the terms of its samples; means are
            still over all samples. A sample of two classes has their weights by its shares.
    """

    class_weight_C: Tensor | None

    def __init__(
        self,
        *,
        smoothing: float = 0.0,
        weight: float = 1.0,
        criterion: Criterion = "ce",
        threshold: float = 0.0,
        class_weight_C: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.weight = weight
        self.criterion = criterion
        self.threshold = threshold
        self.register_buffer("class_weight_C", class_weight_C, persistent=False)

    def scaled(self, weight: Tensor | float) -> Tensor | float:
        """A cross-entropy's weight in the fused loss, where the method has it at ``weight``."""
        if self.criterion == "bce":
            return 0.0
        return weight if self.weight == 1.0 else weight * self.weight

    def arguments(
        self, labels_B: Tensor, mixed_with: Mixed, weight: Tensor | float = 1.0
    ) -> dict[str, Any]:
        """What the fused losses get for the labels; the method has its CE at ``weight``."""
        mixed_with, sample_weight_B = self._weighed(labels_B, mixed_with)
        return {
            "ce_weight": self.scaled(weight),
            "label_smoothing": self.smoothing,
            "mixed_with": mixed_with,
            "sample_weight_B": sample_weight_B,
        }

    def losses(
        self,
        loss: MixtureLoss,
        logits_SBC: Tensor,
        labels_B: Tensor,
        mixed_with: Mixed,
        weight: Tensor | float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """The total and the students' terms ``[S]`` without their weights, given the fused loss.

        ``weight``: as for :meth:`arguments`.
        """
        if self.criterion == "ce":
            return loss.total, loss.ce_S
        bce_S = self.binary(logits_SBC, labels_B, mixed_with)
        return loss.total + (bce_S * weight).sum() * self.weight, bce_S.detach()

    def binary(self, logits_SBC: Tensor, labels_B: Tensor, mixed_with: Mixed) -> Tensor:
        """The binary cross-entropy of each student, ``[S]``: the mean over samples and classes."""
        z_SBC = logits_SBC if logits_SBC.dtype == torch.float64 else logits_SBC.float()
        weighed, sample_weight_B = self._weighed(labels_B, mixed_with)
        # A threshold compares the shares of the labels, not those of their weights.
        y_BC = self._targets(labels_B, mixed_with if self.threshold else weighed, z_SBC)
        with torch.autocast(z_SBC.device.type, enabled=False):
            bce_SBC = F.binary_cross_entropy_with_logits(
                z_SBC, y_BC.expand_as(z_SBC), reduction="none"
            )
        if sample_weight_B is not None:
            bce_SBC = bce_SBC * sample_weight_B[:, None]
        return bce_SBC.sum((1, 2)) / max(y_BC.numel(), 1)

    def _targets(self, labels_B: Tensor, mixed_with: Mixed, like: Tensor) -> Tensor:
        """``[B, C]``: NaN for a sample whose id is out of range."""
        C = like.shape[2]
        y_BC = _one_hot(labels_B, None, C, like.dtype)
        if mixed_with is not None:
            labels2_B, share2_B = mixed_with
            share2_B = share2_B.to(like.dtype)
            y_BC = _one_hot(labels_B, 1.0 - share2_B, C, like.dtype)
            y_BC = y_BC + _one_hot(labels2_B, share2_B, C, like.dtype)
        y_BC = (1.0 - self.smoothing) * y_BC + self.smoothing / C
        if self.threshold > 0.0:
            y_BC = torch.where(y_BC.isnan(), y_BC, (y_BC > self.threshold).to(y_BC.dtype))
        return y_BC

    def _weighed(self, labels_B: Tensor, mixed_with: Mixed) -> tuple[Mixed, Tensor | None]:
        """The mixed labels and the samples' weights that class weights w make of them.

        (1 - s) w1 CE1 + s w2 CE2 = W ((1 - s') CE1 + s' CE2), W = (1 - s) w1 + s w2, s' = s w2 / W.
        """
        if self.class_weight_C is None:
            return mixed_with, None
        weight_B = self._of_class(labels_B)
        if mixed_with is None:
            return None, weight_B
        labels2_B, share2_B = mixed_with
        second_B = share2_B * self._of_class(labels2_B)
        sample_weight_B = (1.0 - share2_B) * weight_B + second_B
        return (labels2_B, second_B / sample_weight_B), sample_weight_B

    def _of_class(self, labels_B: Tensor) -> Tensor:
        """The weights of samples; an id out of range, which the loss turns into NaN, has any."""
        assert self.class_weight_C is not None
        return self.class_weight_C[labels_B.clamp(0, len(self.class_weight_C) - 1)]


def _one_hot(labels_B: Tensor, share_B: Tensor | None, C: int, dtype: torch.dtype) -> Tensor:
    """``[B, C]`` shares of the labels; NaN for an id out of range whose share isn't 0."""
    valid_B = (labels_B >= 0) & (labels_B < C)
    if share_B is None:
        share_B = torch.ones_like(labels_B, dtype=dtype)
    fill_B = torch.where(valid_B | (share_B == 0), 0.0, math.nan).to(dtype)
    is_class_BC = labels_B[:, None] == torch.arange(C, device=labels_B.device)
    return torch.where(is_class_BC, share_B[:, None], fill_B[:, None])


def balanced_weights(labels_N: Tensor, num_classes: int) -> Tensor:
    """``[C]``: N / (K n_c) for K classes with n_c > 0 of N images, whose mean over the images is 1.

    As scikit-learn's ``class_weight="balanced"``. A class without images has N / K. fp32, on the CPU.
    """
    counts_C = torch.bincount(labels_N.cpu(), minlength=num_classes).double()
    present = (counts_C > 0).sum()
    return (counts_C.sum() / (present * counts_C.clamp_min(1))).float()
