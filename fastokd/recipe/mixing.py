"""What a recipe may say of mixed images and of the samples that an epoch draws."""

from __future__ import annotations

from typing import Any

from fastokd.errors import UserError

# Settings that say how images are mixed, and what they are where nothing is.
HOW = {"mix_prob": 1.0, "mix_switch_prob": 0.5, "mix_epochs": 0, "mix_each": False}


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
    without = [] if on else list(HOW)
    if len(on) == 1:
        without = ["mix_switch_prob"]
    for name in without:
        value = getattr(recipe, name)
        if value != HOW[name]:
            why, fix = (
                (f"only {on[0]} is above 0", "both")
                if on
                else ("mixup and cutmix are 0", "one of them")
            )
            raise UserError(f"{name} is {value}, but {why}: leave it out, or set {fix} above 0")
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
