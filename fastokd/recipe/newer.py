"""The published settings of the methods after the two papers: what differs from OKDDip's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from fastokd.errors import UserError
from fastokd.recipe.recipe import Recipe, models

# Sets of at least 64 classes, of which MCL's batches have two images each.
_MANY_CLASSES = ("cifar100", "tiny_imagenet")


def _mcl(base: Recipe) -> Recipe:
    """winycg/MCL, main_cifar.py and main_imagenet.py with the README's commands."""
    if base.dataset == "imagenet":
        options = {**base.method_options, "form": "memory", "tau": 0.07}
        return replace(base, method_options=options)
    model_options = base.model_options
    of_models = [models.option_defaults(name) for name in dict.fromkeys(base.models)]
    if base.sharing == "branch" and all("branch_from" in options for options in of_models):
        # The branches share the stem and the first stage.
        model_options = {**model_options, "branch_from": 2}
    return replace(
        base,
        schedule="cosine",
        images_per_class=2 if base.dataset in _MANY_CLASSES else 0,
        model_options=model_options,
    )


def _mcl_logits(base: Recipe) -> Recipe:
    """The README's --logit-distill."""
    options = {**base.method_options, "logit_distill": True}
    return replace(base, method_options=options)


def _mcl_okd(base: Recipe) -> Recipe:
    """winycg/MCL-OKD, main_cifar_mcl_okd.py and main_imagenet_mcl_okd.py with the README's commands."""
    imagenet = base.dataset == "imagenet"
    many = imagenet or base.model.startswith("vgg")
    options = {**base.method_options, "form": "okd", "negatives": 16384 if many else 256}
    if imagenet:
        base = replace(base, epochs=100)
    return replace(
        base,
        lr=0.05,
        schedule="cosine",
        batch_size=128 if imagenet else 64,
        images_per_class=0,
        method_options=options,
    )


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
        base = replace(base, teacher=f"baseline/{teacher}/{base.dataset}")
    own = {"imagenet": imagenet, "cifar10": cifar, "cifar100": cifar}.get(base.dataset, {})
    return replace(base, method_options={**base.method_options, **options}, **own)


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


def _dist_from(teacher: str, base: Recipe) -> Recipe:
    """The README's stronger teachers on ImageNet: torchvision's."""
    if base.dataset != "imagenet":
        raise UserError(
            f"dist-{teacher} names a teacher on ImageNet, but the data set is {base.dataset}: leave "
            f"-{teacher} out, or set teacher"
        )
    return replace(base, teacher=f"baseline/torchvision:{teacher}/{base.dataset}")


# For each method: from OKDDip's settings on the recipe's data set to its own.
SETTINGS: dict[str, Callable[[Recipe], Recipe]] = {
    "dist": _dist,
    "dkd": _dkd,
    "mcl": _mcl,
    "okdph": _okdph,
    "pcl": _pcl,
}
# For each method its published variants by the word in a recipe's name: from its own settings to theirs.
VARIANTS: dict[str, dict[str, Callable[[Recipe], Recipe]]] = {
    "dist": {name: partial(_dist_from, name) for name in ("resnet50", "resnet101", "resnet152")},
    "mcl": {"logits": _mcl_logits, "okd": _mcl_okd},
}
