"""What fits together of a recipe's settings of the loss on labels."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastokd.errors import UserError

FIELDS = ("label_smoothing", "ce_weight", "criterion", "target_threshold", "class_weights")


def changed(recipe: Any) -> list[str]:
    """The fields of these settings whose values in a ``Recipe`` aren't their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(recipe)}
    return [name for name in FIELDS if getattr(recipe, name) != defaults[name]]


def check_label_loss(recipe: Any, uses_them: bool) -> None:
    """Checks a ``Recipe``; ``uses_them``: its method's ``needs.label_loss``.

    Raises:
        UserError: settings that contradict each other, or that the method doesn't use.
    """
    names = changed(recipe)
    if names and not uses_them:
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
