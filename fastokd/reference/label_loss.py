"""The loss on labels with the recipe's settings, from one dense target for each sample."""

from __future__ import annotations

from collections.abc import Callable

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
    """One student's term. Class weights multiply each label's own loss before they are mixed; where a
    threshold makes the mixed labels one target, their loss by the mean of both weights."""
    C, dtype = logits_BC.shape[1], logits_BC.dtype
    weight_C = torch.ones(C, dtype=dtype) if class_weight_C is None else class_weight_C.to(dtype)

    def bce(y_BC: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits_BC, y_BC, reduction="none").mean(1)

    def loss_of(ids_B: Tensor) -> Tensor:
        if criterion == "bce":
            loss_B = bce(soft_targets(ids_B, C, None, smoothing, dtype))
        else:
            loss_B = F.cross_entropy(logits_BC, ids_B, reduction="none", label_smoothing=smoothing)
        return loss_B * weight_C[ids_B]

    def mixed(of: Callable[[Tensor], Tensor]) -> Tensor:
        if mixed_with is None:
            return of(labels_B)
        labels2_B, share2_B = mixed_with
        share2_B = share2_B.to(dtype)
        return (1 - share2_B) * of(labels_B) + share2_B * of(labels2_B)

    if threshold:
        y_BC = soft_targets(labels_B, C, mixed_with, smoothing, dtype).gt(threshold).to(dtype)
        return weight * (bce(y_BC) * mixed(lambda ids_B: weight_C[ids_B])).mean()
    return weight * mixed(loss_of).mean()
