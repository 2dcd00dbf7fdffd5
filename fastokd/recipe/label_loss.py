"""The settings of the loss on labels: what fits together, and what methods get of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastokd.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from fastokd.methods import LabelLoss, Needs
    from fastokd.recipe.recipe import Recipe

FIELDS = ("label_smoothing", "ce_weight", "criterion", "target_threshold", "class_weights")


def changed(recipe: Recipe) -> list[str]:
    """The fields whose values aren't their defaults."""
    fields: Any = type(recipe).__dataclass_fields__
    return [name for name in FIELDS if getattr(recipe, name) != fields[name].default]


def check_label_loss(recipe: Recipe, needs: Needs) -> None:
    """Raises UserError for settings that contradict each other, or that the method doesn't use."""
    names = changed(recipe)
    if names and not needs.label_loss:
        raise UserError(
            f"{names[0]} is {getattr(recipe, names[0])!r}, but {recipe.method} doesn't use the settings of "
            "the loss on labels: leave it out, or write self.label_loss into the method's losses and "
            "label_loss=True into its needs"
        )
    if recipe.target_threshold and recipe.criterion != "bce":
        raise UserError(
            f"target_threshold is {recipe.target_threshold}, but criterion is {recipe.criterion!r}: set "
            "criterion to 'bce', or leave target_threshold out"
        )


def label_loss_of(
    recipe: Recipe, num_classes: int, class_weight_C: Tensor | None = None
) -> LabelLoss | None:
    """The recipe's loss on labels; None where every setting has its default.

    ``class_weight_C``: of the training images, for ``class_weights="balanced"``; without it every class has
    weight 1, where no run is trained.

    Raises:
        UserError: a threshold below which no, or above which every, class of this number is a target.
    """
    if not changed(recipe):
        return None
    import torch

    from fastokd.methods import LabelLoss

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
