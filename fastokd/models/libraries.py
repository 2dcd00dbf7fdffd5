"""The classifiers of torchvision and timm by name: ``torchvision:NAME``, ``timm:NAME``.

Weights are drawn by the library's own initialisation; nothing is ever downloaded.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from fastokd.errors import UserError, in_one_line, unknown_name
from fastokd.known import MODELS, Later
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
    build = partial(_build, name, new, size)
    return ModelSpec(name, build, size, about, library_options=partial(_options, name))


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
    except Exception as error:  # raised by the library's own code
        if not options:
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise UserError(f"{name} doesn't take {given}: {in_one_line(error)}") from error
    size = input_size or stated_size(options) or size
    form = (name, num_classes, size, split_at, repr(sorted(options.items())))
    student = ExternalStudent(net, name, num_classes, size, split_at, _FOUND.get(form))
    _FOUND[form] = student.found
    return student


def _options(name: str) -> Mapping[str, Any]:
    """The options of the library's constructor that have a name and a default."""
    prefix, _, arch = name.partition(":")
    builder = _builder(prefix, arch)
    owner = inspect.signature(builder).return_annotation
    if owner is inspect.Signature.empty:  # some of timm's don't say their class
        with torch.device("meta"):
            owner = type(builder())
    found: dict[str, Any] = {}
    for base in owner.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        found = {**{p.name: p.default for p in parameters if p.default is not p.empty}, **found}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return {key: value for key, value in found.items() if key not in (*DOWNLOADS, "num_classes")}


def _builder(prefix: str, arch: str) -> Callable[..., nn.Module]:
    if prefix == "torchvision":
        return models.get_model_builder(arch)
    return timm.models.model_entrypoint(arch.partition(".")[0])


def unknown_model(name: str) -> UserError:
    """The error for an unknown student: the network of that name in a library, or the nearest names."""
    arch = name.partition(":")[2] or name
    networks = {prefix: known() for prefix, known in NETWORKS.items()}
    same = [f"{prefix}:{arch}" for prefix, known in networks.items() if arch in known]
    if same:
        return UserError(f"unknown model {name!r}: did you mean {' or '.join(same)}?")
    if not difflib.get_close_matches(name, MODELS):
        everywhere = {
            f"{prefix}:{other}": other for prefix, known in networks.items() for other in known
        }
        near = difflib.get_close_matches(arch, [*everywhere.values()], n=2)
        same = [full for full, other in everywhere.items() if other in near]
    if same:
        return UserError(f"unknown model {name!r}: did you mean {' or '.join(same)}?")
    return unknown_name("model", name, MODELS)


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
    if arch not in _of_torchvision():
        raise _unknown(name, _of_torchvision())
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
        raise _unknown(name, known)
    cfg = timm.models.get_pretrained_cfg(arch)
    size = cfg.input_size[-1] if cfg is not None and cfg.input_size else 224
    return partial(timm.create_model, arch, pretrained=False), size


def _unknown(name: str, known: list[str]) -> UserError:
    """The error for a network that its library doesn't have; the other one may have it."""
    prefix, _, arch = name.partition(":")
    other = next(f"{library}:{arch}" for library in LIBRARIES if library != prefix)
    if arch in NETWORKS[other.partition(":")[0]]():
        return UserError(f"{prefix} has no {arch}: did you mean {other}?")
    return unknown_name(f"{prefix} model", arch, known)


def _of_torchvision() -> list[str]:
    known: list[str] = models.list_models(module=models)
    return known


def _of_timm() -> list[str]:
    """The names of timm's networks; none where it isn't installed."""
    return timm.list_models() if importlib.util.find_spec("timm") else []


WITH_AUX = ("googlenet", "inception_v3")
LIBRARIES = {"torchvision": _torchvision, "timm": _timm}
# The networks of each library, by its prefix.
NETWORKS = {"torchvision": _of_torchvision, "timm": _of_timm}
