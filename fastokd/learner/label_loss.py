"""The loss on labels of a recipe's settings."""

from __future__ import annotations

import torch
from torch import Tensor

from fastokd.errors import UserError
from fastokd.methods import LabelLoss
from fastokd.recipe.label_loss import changed
from fastokd.recipe.recipe import Recipe


def label_loss_of(
    recipe: Recipe, num_classes: int, class_weight_C: Tensor | None = None
) -> LabelLoss | None:
    """The recipe's loss on labels; None where every setting has its default.

    ``class_weight_C``: of the training images, for ``class_weights="balanced"``; without it, where no run is
    trained, every class has weight 1.

    Raises:
        UserError: a threshold below which no, or above which every, class of this number is a target.
    """
    if not changed(recipe):
        return None
    threshold, smoothing = recipe.target_threshold, recipe.label_smoothing
    least, most = smoothing / num_classes, 1.0 - smoothing + smoothing / num_classes
    if threshold and not least <= threshold < most:
        raise UserError(
            f"target_threshold is {threshold}, but with label_smoothing {smoothing} the targets of "
            f"{num_classes} classes are {least:g} and {most:g}: it must be at least {least:g} and below "
            f"{most:g}"
        )
    if recipe.class_weights == "none":
        class_weight_C = None
    elif class_weight_C is None:
        class_weight_C = torch.ones(num_classes)
    return LabelLoss(
        smoothing=smoothing,
        weight=recipe.ce_weight,
        criterion=recipe.criterion,
        threshold=threshold,
        class_weight_C=class_weight_C,
    )
