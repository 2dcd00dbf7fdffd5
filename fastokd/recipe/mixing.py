"""What a recipe may say of mixed images and of the samples that an epoch draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastokd.errors import UserError

if TYPE_CHECKING:
    from fastokd.recipe.recipe import Recipe

# Settings that say how images are mixed, and what they are where nothing is.
HOW = {"mix_prob": 1.0, "mix_switch_prob": 0.5, "mix_epochs": 0, "mix_each": False}


def check_mixing(recipe: Recipe, *, takes_mixed: bool) -> None:
    """Raises UserError where the settings of mixing and sampling contradict each other.

    ``takes_mixed``: the recipe's method takes mixed labels.
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
            what = "mixup and cutmix are 0" if not on else f"only {on[0]} is above 0"
            raise UserError(f"{name} is {value}, but {what}: leave it out, or set both above 0")
    if recipe.mix_epochs > recipe.epochs:
        raise UserError(
            f"mix_epochs is {recipe.mix_epochs}, but there are {recipe.epochs} epochs: choose at most as "
            "many, or 0 for all"
        )
    if recipe.balanced and recipe.repeats > 1:
        raise UserError(
            f"repeats is {recipe.repeats}, but balanced draws each image anew: set repeats to 1, or "
            "balanced to false"
        )
