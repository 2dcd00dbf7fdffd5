"""The classifiers of torchvision and timm by name: ``torchvision:NAME``, ``timm:NAME``.

Weights are drawn by the library's own initialisation; nothing is ever downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from fastokd.errors import UserError, unknown_name
from fastokd.known import Later
from fastokd.models.external import ExternalStudent
from fastokd.models.probe import Probe
from fastokd.models.spec import ModelSpec, stated_size

# Options of either library that download weights.
DOWNLOADS = ("pretrained", "weights", "weights_backbone", "checkpoint_path", "pretrained_cfg")
# Each takes a second to import, and timm may be missing.
models, timm = Later("torchvision.models"), Later("timm")
# A cohort builds the same network many times, with features and maps in the same places.
_FOUND: dict[tuple[object, ...], Probe] = {}


def resolve(name: str) -> ModelSpec:
    """The spec of ``torchvision:NAME`` or ``timm:NAME``.

    Its options: ``split_at`` (a module's dotted name, for branch sharing), ``input_size`` (height
    and width at which the maps are located; by default ``img_size`` or ``image_size`` if the
    constructor is given one, else the library's default), and the options of the library's
    constructor, except those that download weights.

    Raises:
        UserError: another prefix, a network that the library doesn't have, timm missing.
    """
    prefix, _, arch = name.partition(":")
    if prefix not in LIBRARIES:
        raise UserError(f"model {name!r} has an unknown prefix: use {' or '.join(LIBRARIES)}")
    new, size = LIBRARIES[prefix](name, arch)
    about = f"{arch} as {prefix} has it"
    return ModelSpec(name, partial(_build, name, new, size), size, about)


def _build(
    name: str,
    new: Callable[..., nn.Module],
    size: int,
    num_classes: int,
    *,
    split_at: str | None = None,
    input_size: int | None = None,
    **options: Any,
) -> ExternalStudent:
    for option in DOWNLOADS:
        if options.get(option):
            raise UserError(f"option {option!r} of {name} would fetch weights: leave it out")
        options.pop(option, None)
    try:
        net = _construct(partial(new, num_classes=num_classes, **options))
    except TypeError as error:
        raise UserError(f"{name} doesn't take these options: {error}") from error
    size = input_size or stated_size(options) or size
    form = (name, num_classes, size, split_at, repr(sorted(options.items())))
    student = ExternalStudent(net, name, num_classes, size, split_at, _FOUND.get(form))
    _FOUND[form] = student.found
    return student


def _construct(new: Callable[[], nn.Module]) -> nn.Module:
    """``new()`` on the default device. If that is meta and the constructor computes with tensors
    (torchvision's RegNets), it is built on the CPU and moved."""
    try:
        return new()
    except (NotImplementedError, RuntimeError):
        if torch.get_default_device().type != "meta":
            raise
    with torch.device("cpu"):
        return new().to("meta")


def _torchvision(name: str, arch: str) -> tuple[Callable[..., nn.Module], int]:
    known = models.list_models(module=models)
    if arch not in known:
        raise unknown_name("torchvision model", arch, known)
    weights = models.get_model_weights(arch)
    crops = [getattr(w.transforms, "keywords", {}).get("crop_size") for w in weights]
    size = min((crop for crop in crops if crop), default=224)
    # Auxiliary classifiers make the training output a tuple.
    plain = {"aux_logits": False, "init_weights": True} if arch in WITH_AUX else {}
    return partial(models.get_model, arch, weights=None, **plain), size


def _timm(name: str, arch: str) -> tuple[Callable[..., nn.Module], int]:
    try:
        known = timm.list_models()
    except ImportError as error:
        raise UserError(f"{name} needs timm, which isn't installed: pip install timm") from error
    if arch.partition(".")[0] not in known:
        raise unknown_name("timm model", arch, known)
    cfg = timm.models.get_pretrained_cfg(arch)
    size = cfg.input_size[-1] if cfg is not None and cfg.input_size else 224
    return partial(timm.create_model, arch, pretrained=False), size


WITH_AUX = ("googlenet", "inception_v3")
LIBRARIES = {"torchvision": _torchvision, "timm": _timm}
