"""How a recipe's batches are mixed."""

from __future__ import annotations

from fastokd.data.mixing import Mixing
from fastokd.recipe.recipe import Recipe


def mixing_of(recipe: Recipe) -> Mixing | None:
    """The mixing that ``recipe`` asks for, or None."""
    if not (recipe.mixup or recipe.cutmix):
        return None
    return Mixing(
        recipe.mixup,
        recipe.cutmix,
        prob=recipe.mix_prob,
        switch_prob=recipe.mix_switch_prob,
        epochs=recipe.mix_epochs,
        each=recipe.mix_each,
        seed=recipe.seed,
    )
