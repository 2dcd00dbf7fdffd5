"""The published settings of the methods after the two papers: what differs from OKDDip's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from fastokd.recipe.recipe import Recipe

# The teachers of DKD's and DIST's tables; of other students as KD's.
TEACHERS = {
    "resnet20": "resnet56",
    "resnet32": "resnet110_basic",
    "wrn_16_2_basic": "wrn_40_2_basic",
    "wrn_40_1_basic": "wrn_40_2_basic",
    "resnet18": "resnet34",
    "resnet34": "torchvision:resnet50",
}


def _taught(
    base: Recipe, options: dict[str, Any], cifar: dict[str, Any], imagenet: dict[str, Any]
) -> Recipe:
    """A student of a teacher with the method's ``options``, and its settings on the published data sets."""
    teacher = TEACHERS.get(base.model)
    if teacher is not None:
        base = dataclasses.replace(base, teacher=f"baseline/{teacher}/{base.dataset}")
    own = {"imagenet": imagenet, "cifar10": cifar, "cifar100": cifar}.get(base.dataset, {})
    return dataclasses.replace(base, method_options={**base.method_options, **options}, **own)


# mdistiller's, for DIST as well.
_CIFAR = {
    "nesterov": False,
    "lr": 0.05,
    "batch_size": 64,
    "epochs": 240,
    "milestones": (150, 180, 210),
}


def _dkd(base: Recipe) -> Recipe:
    """T, beta and the warm-up are ImageNet's own; beta is smaller for ResNets that start at 16 channels, WRN
    and VGG."""
    imagenet = base.dataset == "imagenet"
    beta = 2.0 if base.model in ("resnet20", "resnet32") else 8.0
    if base.model.startswith(("wrn", "vgg")):
        beta = 6.0
    options = {"temperature": 4.0, "alpha": 1.0, "beta": beta, "warmup": 20.0}
    if imagenet:
        options = {"temperature": 1.0, "alpha": 1.0, "beta": 0.5, "warmup": 1.0}
    schedule = {"epochs": 100, "milestones": (30, 60, 90)}
    return _taught(
        base, options, _CIFAR, {**schedule, "nesterov": False, "lr": 0.2, "batch_size": 512}
    )


def _dist(base: Recipe) -> Recipe:
    temperature = 1.0 if base.dataset == "imagenet" else 4.0
    options = {"temperature": temperature, "kd_weight": 2.0, "beta": 1.0, "gamma": 1.0}
    schedule = {"epochs": 100, "milestones": (30, 60, 90)}
    return _taught(base, options, _CIFAR, {**schedule, "decay_norms": False})


# For each method: from OKDDip's settings on the recipe's data set to its own.
SETTINGS: dict[str, Callable[[Recipe], Recipe]] = {
    "dist": _dist,
    "dkd": _dkd,
}
