"""What a recipe may say of mixed images and of the samples that an epoch draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastokd.errors import UserError
from fastokd.recipe.fields import at_least, at_most, between


@dataclass(frozen=True, kw_only=True)
class MixingSettings:
    """Mixed images, and the samples that an epoch draws."""

    mixup: Annotated[
        float,
        "Alpha of Mixup, whose lambda is of Beta(alpha, alpha); 0 for none.",
        between(0, 1000),
    ] = 0.0
    cutmix: Annotated[float, "The same of CutMix.", between(0, 1000)] = 0.0
    mix_prob: Annotated[float, "The probability that a batch is mixed.", between(0, 1)] = 1.0
    mix_switch_prob: Annotated[
        float,
        "With both, the probability that a batch that is mixed is so by CutMix.",
        between(0, 1),
    ] = 0.5
    mix_epochs: Annotated[
        int,
        "Epochs with mixing, from the first; a change of `epochs` scales them; 0: all.",
        at_least(0),
    ] = 0
    mix_each: Annotated[
        bool, "Lambda, box and choice are drawn for each image; else once for each batch."
    ] = False
    repeats: Annotated[
        int,
        "Repeated augmentation: copies of an image in a batch. An epoch then has as many images as "
        "without, rounded down to a multiple of 256.",
        at_least(1),
        at_most(64),
    ] = 1
    balanced: Annotated[
        bool,
        "Draw every class equally often, with replacement; an epoch has as many images as without.",
    ] = False
    images_per_class: Annotated[
        int,
        "Images of each class in a batch, whose classes are drawn for every batch; 0: images are drawn "
        "whatever their class. A last batch that isn't full is left out.",
        at_least(0),
    ] = 0


def check_mixing(recipe: Any, *, takes_mixed: bool) -> None:
    """Raises UserError where the settings of mixing and sampling contradict each other.

    Args:
        recipe: a :class:`Recipe` whose fields have passed their own bounds.
        takes_mixed: the recipe's method takes mixed labels.
    """
    on = [name for name in ("mixup", "cutmix") if getattr(recipe, name) > 0]
    if on and not takes_mixed:
        raise UserError(
            f"{on[0]} is {getattr(recipe, on[0])}, but {recipe.method} takes no mixed labels: set it to 0"
        )
    if recipe.mix_epochs > recipe.epochs:
        raise UserError(
            f"mix_epochs is {recipe.mix_epochs}, but there are {recipe.epochs} epochs: choose at most as "
            "many, or 0 for all"
        )
    if recipe.balanced and recipe.class_weights == "balanced":
        raise UserError(
            "class_weights is 'balanced', but balanced draws all classes equally often already: set one of "
            "them to none or false"
        )
    if recipe.balanced and recipe.repeats > 1:
        raise UserError(
            f"repeats is {recipe.repeats}, but balanced draws each image anew: set repeats to 1, or "
            "balanced to false"
        )
    if recipe.images_per_class and (recipe.balanced or recipe.repeats > 1):
        other = "balanced" if recipe.balanced else "repeats"
        raise UserError(
            f"images_per_class is {recipe.images_per_class}, but {other} draws the images of a batch in "
            "another way: set one of them to its default"
        )
    if recipe.images_per_class and recipe.batch_size % recipe.images_per_class:
        raise UserError(
            f"images_per_class is {recipe.images_per_class}, but batch_size is {recipe.batch_size}: choose "
            "a divisor of it, or 0"
        )
