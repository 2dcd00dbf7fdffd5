"""What fits together of a recipe's settings of the loss on labels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastokd.errors import UserError
from fastokd.recipe.fields import BELOW_ONE, NOT_NEGATIVE

FIELDS = ("label_smoothing", "ce_weight", "criterion", "target_threshold", "class_weights")


@dataclass(frozen=True, kw_only=True)
class LabelLossSettings:
    """The loss on labels."""

    label_smoothing: Annotated[
        float,
        "Share of the labels that is spread over all classes, in every term with labels.",
        BELOW_ONE,
    ] = 0.0
    ce_weight: Annotated[
        float, "Factor of every term with labels; distillation keeps its weight.", NOT_NEGATIVE
    ] = 1.0
    criterion: Annotated[
        Literal["ce", "bce"],
        "The loss on labels: `ce` (cross-entropy) or `bce` (binary cross-entropy, the mean over classes).",
    ] = "ce"
    target_threshold: Annotated[
        float,
        "With `bce`: a class is a target, wholly, where its smoothed or mixed label is above it; 0 for "
        "none.",
        BELOW_ONE,
    ] = 0.0
    class_weights: Annotated[
        Literal["none", "balanced"],
        "Weights of the images in the loss on labels: `none`, or `balanced`, the inverse of their class's "
        "frequency, 1 on average.",
    ] = "none"


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
