"""The students by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastokd.errors import UserError, unknown_name
from fastokd.models.student import Student


@dataclass(frozen=True)
class ModelSpec:
    """A named student.

    ``build(num_classes, **options)`` makes it with its published initialisation, drawn from
    torch's global generator; ``input_size`` is the height and width that it was published for.
    ``branch_options`` are the options that differ in the published branch form (VGG's dropout).
    """

    name: str
    build: Callable[..., Student]
    input_size: int
    about: str
    branch_options: Mapping[str, Any] = field(default_factory=dict)


_SPECS: dict[str, ModelSpec] = {}


def register_model(
    name: str,
    build: Callable[..., Student],
    *,
    input_size: int,
    about: str,
    branch_options: Mapping[str, Any] | None = None,
) -> None:
    """Adds a student under ``name``; a name can be given once."""
    if name in _SPECS:
        raise UserError(f"a model named {name!r} is registered already: choose another name")
    _SPECS[name] = ModelSpec(name, build, input_size, about, dict(branch_options or {}))


def list_models() -> list[str]:
    """The registered names.

    :func:`create_model` takes these, and any classifier of another library behind its prefix:
    ``torchvision:mobilenet_v2``, ``timm:mobilenetv3_small_100``.
    """
    return sorted(_SPECS)


def model_spec(name: str) -> ModelSpec:
    """The entry of one student; an unknown name raises and offers the nearest ones."""
    if ":" in name:
        # Here, so that neither library is imported before one of its models is asked for.
        from fastokd.models.libraries import resolve

        return resolve(name)
    if name not in _SPECS:
        raise unknown_name("model", name, _SPECS)
    return _SPECS[name]


def input_size(name: str, options: Mapping[str, Any]) -> int:
    """The height and width that the student ``name`` is made for: by its options, or published."""
    return stated_size(options) or model_spec(name).input_size


def stated_size(options: Mapping[str, Any]) -> int | None:
    """The size that options of a model name: ours, timm's or torchvision's word for it."""
    for key in ("input_size", "img_size", "image_size"):
        size = options.get(key)
        if isinstance(size, tuple | list) and len({*size}) == 1:
            size = size[0]
        if isinstance(size, int) and size > 0:
            return size
    return None


def create_model(name: str, num_classes: int, **options: Any) -> Student:
    """A new student with ``num_classes`` outputs (at least 2).

    Its weights are drawn from torch's global generator.

    Raises:
        UserError: an unknown name, too few classes, an option that the model doesn't have.
    """
    spec = model_spec(name)
    if num_classes < 2:
        raise UserError(f"num_classes is {num_classes}, but a classifier needs at least 2")
    try:
        inspect.signature(spec.build).bind(num_classes, **options)
    except TypeError as error:
        raise UserError(f"model {name} doesn't take these options: {error}") from error
    return spec.build(num_classes, **options)
