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


def _mcl_logits(base: Recipe) -> Recipe:
    """The README's --logit-distill."""
    options = {**base.method_options, "logit_distill": True}
    return dataclasses.replace(base, method_options=options)


def _mcl_okd(base: Recipe) -> Recipe:
    """winycg/MCL-OKD, main_cifar_mcl_okd.py and main_imagenet_mcl_okd.py with the README's commands."""
    imagenet = base.dataset == "imagenet"
    options = {**base.method_options, "form": "okd", "negatives": 16384 if imagenet else 256}
    if imagenet:
        base = dataclasses.replace(base, epochs=100)
    return dataclasses.replace(
        base,
        lr=0.05,
        schedule="cosine",
        batch_size=128 if imagenet else 64,
        images_per_class=0,
        method_options=options,
    )


# For each method: from OKDDip's settings on the recipe's data set to its own.
SETTINGS: dict[str, Callable[[Recipe], Recipe]] = {"mcl": _mcl}
# For each method its published variants by the word in a recipe's name: from its own settings to theirs.
VARIANTS: dict[str, dict[str, Callable[[Recipe], Recipe]]] = {
    "mcl": {"logits": _mcl_logits, "okd": _mcl_okd}
}
