"""The published settings of the methods after the two papers: what differs from OKDDip's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fastokd.recipe.recipe import Recipe, models

# Sets of at least 64 classes, of which MCL's batches have two images each.
_MANY_CLASSES = ("cifar100", "tiny_imagenet")


def _mcl(base: Recipe) -> Recipe:
    """winycg/MCL, main_cifar.py and main_imagenet.py with the README's commands."""
    if base.dataset == "imagenet":
        options = {**base.method_options, "form": "memory", "tau": 0.07}
        return dataclasses.replace(base, method_options=options)
    model_options = base.model_options
    of_models = [models.option_defaults(name) for name in dict.fromkeys(base.models)]
    if base.sharing == "branch" and all("branch_from" in options for options in of_models):
        # The branches share the stem and the first stage.
        model_options = {**model_options, "branch_from": 2}
    return dataclasses.replace(
        base,
        schedule="cosine",
        images_per_class=2 if base.dataset in _MANY_CLASSES else 0,
        model_options=model_options,
    )


# For each method: from OKDDip's settings on the recipe's data set to its own.
SETTINGS: dict[str, Callable[[Recipe], Recipe]] = {"mcl": _mcl}
