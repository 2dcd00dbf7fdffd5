"""The published settings of the methods after the two papers: what differs from OKDDip's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastokd.recipe.recipe import Recipe

# OKDPH's omega, beta, gamma and fusion on CIFAR-100, and those on CIFAR-10 where they are others.
_OKDPH = {
    "resnet32": (1.0, 0.5, 1.0, "batch", 5),
    "resnet110": (0.8, 0.8, 0.5, "batch", 5),
    "wrn_20_8": (0.5, 0.5, 0.5, "batch", 5),
    "vgg16": (0.3, 0.3, 1.0, "epoch", 1),
    "densenet_40_12": (1.0, 0.5, 0.5, "batch", 5),
}
_OKDPH_CIFAR10 = {
    "resnet110": (0.8, 0.8, 0.5, "batch", 5),
    "densenet_40_12": (0.8, 0.8, 0.5, "batch", 5),
    "vgg16": _OKDPH["vgg16"],
}


def _okdph(base: Recipe) -> Recipe:
    """Unpublished combinations have those of ResNet-110 on CIFAR-100, which most of its models share."""
    model = base.model.partition("+")[0]
    if base.dataset == "cifar10":
        found = _OKDPH_CIFAR10.get(model, (0.8, 0.8, 0.5, "epoch", 1))
    else:
        found = _OKDPH.get(model, _OKDPH["resnet110"])
    options = dict(zip(("omega", "beta", "gamma", "fusion", "gap"), found, strict=True))
    kinds = ""
    if base.dataset in ("cifar10", "cifar100"):
        first = "rotation" if base.dataset == "cifar100" else "plain"
        published = {
            2: f"{first}+cutout+randaugment",
            4: "plain+cutout+randaugment+autoaugment+none",
        }
        kinds = published.get(base.students, "")
    base = replace(base, nesterov=False, views="student", view_kinds=kinds)
    return replace(base, method_options={**base.method_options, "temperature": 4.0, **options})


def _pcl(base: Recipe) -> Recipe:
    """OKDDip's optimizer and schedule; the heads of VGG begin apart."""
    options = base.method_options
    if base.model.startswith("vgg"):
        options = {**options, "equal_heads": False}
    return replace(base, views="student", method_options=options)


# For each method: from OKDDip's settings on the recipe's data set to its own.
SETTINGS: dict[str, Callable[[Recipe], Recipe]] = {"okdph": _okdph, "pcl": _pcl}
