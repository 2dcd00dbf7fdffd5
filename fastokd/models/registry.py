"""The students by name."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

from fastokd.errors import UserError, in_one_line, wrong_type
from fastokd.known import MODELS
from fastokd.models import libraries
from fastokd.models.spec import ModelSpec, stated_size
from fastokd.models.student import Student

P = ParamSpec("P")
T = TypeVar("T")

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
    if _registered(name) is not None:
        raise UserError(f"a model named {name!r} is registered already: choose another name")
    MODELS.setdefault(name, __name__)
    _SPECS[name] = ModelSpec(name, build, input_size, about, dict(branch_options or {}))


def _registered(name: str) -> ModelSpec | None:
    if name in MODELS:
        import_module(MODELS[name])
    return _SPECS.get(name)


def model_spec(name: str) -> ModelSpec:
    """The entry of one student; an unknown name raises and offers the nearest ones."""
    if ":" in name:
        return libraries.resolve(name)
    spec = _registered(name)
    if spec is None:
        raise libraries.unknown_model(name)
    return spec


def found_once(find: Callable[P, T]) -> Callable[P, T]:
    """``find``, whose first argument is a student's name, run once a process for equal arguments."""
    found: dict[tuple[Any, ...], T] = {}

    @wraps(find)
    def look_up(*args: P.args, **kwargs: P.kwargs) -> T:
        name = str(args[0])
        build = None if ":" in name else model_spec(name).build
        key = (name, build, repr(args), repr(kwargs))
        if key not in found:
            found[key] = find(*args, **kwargs)
        return found[key]

    return look_up


def option_defaults(name: str) -> dict[str, Any]:
    """The options of the student ``name`` that have a default, as :func:`create_model` takes them.

    Those that the name itself decides (the blocks of a ResNet) are left out.
    """
    spec = model_spec(name)
    settled = getattr(spec.build, "keywords", {})
    parameters = inspect.signature(spec.build).parameters.values()
    own = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {**{k: v for k, v in own.items() if k not in settled}, **spec.library_options()}


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Checks the types of those options that have a default that tells it.

    Raises:
        UserError: a value of the wrong type.
    """
    if not options:
        return
    defaults = option_defaults(name)
    for option, value in options.items():
        default, is_bool = defaults.get(option), isinstance(value, bool)
        if isinstance(default, bool) and not is_bool:
            raise wrong_type(option, value, "true or false")
        if isinstance(default, float) and (is_bool or not isinstance(value, numbers.Real)):
            raise wrong_type(option, value, "a number")


def input_size(name: str, options: Mapping[str, Any]) -> int:
    """The height and width that the student ``name`` is made for: by its options, or published."""
    return stated_size(options) or model_spec(name).input_size


def create_model(name: str, num_classes: int, **options: Any) -> Student:
    """A new student with ``num_classes`` outputs (at least 2).

    Its weights are drawn from torch's global generator.

    Raises:
        UserError: an unknown name, too few classes, an option that the model doesn't have, a value
            that its constructor rejects.
    """
    spec = model_spec(name)
    if num_classes < 2:
        raise UserError(f"num_classes is {num_classes}, but a classifier needs at least 2")
    try:
        inspect.signature(spec.build).bind(num_classes, **options)
    except TypeError as error:
        raise UserError(f"model {name} doesn't take these options: {error}") from error
    try:
        return spec.build(num_classes, **options)
    except (TypeError, ValueError) as error:
        if not options or isinstance(error, UserError):
            raise
        raise UserError(
            f"{name} can't be made with {dict(options)}: {in_one_line(error)}"
        ) from error
