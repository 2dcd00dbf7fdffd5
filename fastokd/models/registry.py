"""The students by name."""

from __future__ import annotations

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
    """The names that :func:`create_model` takes."""
    return sorted(_SPECS)


def model_spec(name: str) -> ModelSpec:
    """The entry of one student; an unknown name raises and offers the nearest ones."""
    if name not in _SPECS:
        raise unknown_name("model", name, _SPECS)
    return _SPECS[name]


def create_model(name: str, num_classes: int, **options: Any) -> Student:
    """A new student with ``num_classes`` outputs (at least 2)."""
    spec = model_spec(name)
    if num_classes < 2:
        raise UserError(f"num_classes is {num_classes}, but a classifier needs at least 2")
    return spec.build(num_classes, **options)
