"""The loss on labels with the recipe's settings, from one dense target for each sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def soft_targets(
    labels_B: Tensor,
    num_classes: int,
    mixed_with: tuple[Tensor, Tensor] | None,
    smoothing: float,
    dtype: torch.dtype,
) -> Tensor:
    """``[B, C]``: both labels by their shares, smoothed."""
    y_BC = F.one_hot(labels_B, num_classes).to(dtype)
    if mixed_with is not None:
        labels2_B, share2_B = mixed_with
        share2_B1 = share2_B.to(dtype)[:, None]
        y_BC = (1 - share2_B1) * y_BC + share2_B1 * F.one_hot(labels2_B, num_classes)
    return y_BC * (1 - smoothing) + smoothing / num_classes


def label_loss(
    logits_BC: Tensor,
    labels_B: Tensor,
    *,
    mixed_with: tuple[Tensor, Tensor] | None = None,
    smoothing: float = 0.0,
    weight: float = 1.0,
    criterion: str = "ce",
    threshold: float = 0.0,
    class_weight_C: Tensor | None = None,
) -> Tensor:
    """One student's term. Class weights multiply each label's own cross-entropy before they are mixed."""
    if criterion == "bce":
        C, dtype = logits_BC.shape[1], logits_BC.dtype
        weight_B = torch.ones_like(labels_B, dtype=dtype)
        if class_weight_C is not None:
            weight_B = class_weight_C.to(dtype)[labels_B]
            if mixed_with is not None:
                labels2_B, share2_B = mixed_with
                first_B, second_B = (1 - share2_B) * weight_B, share2_B * class_weight_C[labels2_B]
                weight_B = first_B + second_B
                mixed_with = labels2_B, second_B / weight_B
        y_BC = soft_targets(labels_B, C, mixed_with, smoothing, dtype)
        if threshold:
            y_BC = y_BC.gt(threshold).to(dtype)
        loss_BC = F.binary_cross_entropy_with_logits(logits_BC, y_BC, reduction="none")
        return weight * (loss_BC.mean(1) * weight_B).mean()

    def ce(ids_B: Tensor) -> Tensor:
        loss_B = F.cross_entropy(logits_BC, ids_B, reduction="none", label_smoothing=smoothing)
        return loss_B if class_weight_C is None else loss_B * class_weight_C[ids_B]

    loss_B = ce(labels_B)
    if mixed_with is not None:
        labels2_B, share2_B = mixed_with
        share2_B = share2_B.to(logits_BC.dtype)
        loss_B = (1 - share2_B) * loss_B + share2_B * ce(labels2_B)
    return weight * loss_B.mean()
