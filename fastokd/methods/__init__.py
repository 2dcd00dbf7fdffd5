"""The methods by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from fastokd.cohort import CohortShape
from fastokd.errors import UserError, unknown_name
from fastokd.known import METHODS, list_methods, load
from fastokd.methods.base import Method, MethodLoss, Needs, OptimGroup, Progress, ramp_weight

# Classes of users, by ``package.module:Class``.
_OWN: dict[str, type[Method]] = {}


def register_method(name: str) -> type[Method]:
    """Registers a user's class as a method under its name, ``package.module:Class``.

    The module is imported. Names in recipes that are read from files are never passed here, so that
    files run no code.

    Raises:
        UserError: there is no such module or class, or the class is no :class:`Method`.
    """
    try:
        found = load(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--method {name} can't be loaded: {error}; name it as package.module:Class, and run "
            "where Python finds the package"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"--method {name} is no subclass of fastokd.methods.Method: make it one")
    _OWN[name] = found
    return found


def is_loaded(name: str) -> bool:
    """False for a user's method, ``package.module:Class``, that isn't registered. The recipe and the
    metrics of its runs can be read, but they can't be trained on or evaluated."""
    return ":" not in name or name in _OWN


def known_needs(name: str) -> Needs:
    """What a method needs; of one that isn't loaded (:func:`is_loaded`), what every recipe fulfils."""
    return method_class(name).needs if is_loaded(name) else Needs(min_students=1, leader=True)


def method_class(name: str) -> type[Method]:
    """The class of one method; an unknown name raises and offers the nearest ones."""
    if name in _OWN:
        return _OWN[name]
    if ":" in name:
        raise UserError(
            f"the method {name} is custom code, which a recipe alone doesn't load: add --method {name}"
        )
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    found: type[Method] = load(METHODS[name])
    return found


def option_defaults(name: str) -> dict[str, Any]:
    """The options of a method, those of its base classes included, and their defaults."""
    defaults: dict[str, Any] = {}
    for owner in reversed(method_class(name).__mro__):
        if "__init__" in vars(owner):
            parameters = inspect.signature(vars(owner)["__init__"]).parameters.values()
            defaults |= {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    defaults.pop("impl", None)
    return dict(sorted(defaults.items()))


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Checks the names and the values of the options of a method that is loaded.

    Raises:
        UserError: an unknown option, or a value of the wrong type or out of range.
    """
    if not is_loaded(name):
        return
    defaults = option_defaults(name)
    for option, value in options.items():
        if not defaults:
            raise UserError(f"{name} has no option {option!r}, nor any other: leave it out")
        if option not in defaults:
            raise unknown_name(f"option of {name}", option, defaults)
        default = defaults[option]
        if value is None and default is None:
            continue
        if isinstance(default, bool):
            fits, what = isinstance(value, bool), "true or false"
        elif isinstance(default, str):
            fits, what = isinstance(value, str), f"a word, such as {default}"
        elif isinstance(default, float):
            fits = isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
            what = "a finite number, at least 0"
        else:
            fits, what = isinstance(value, int) and value >= 1, "a whole number, at least 1"
        if not fits or (isinstance(value, bool) and not isinstance(default, bool)):
            raise UserError(f"{option} is {value!r}: it must be {what}")


def create_method(name: str, shape: CohortShape, *, impl: str = "auto", **options: Any) -> Method:
    """A method for a cohort of this shape.

    ``impl``: the implementation of its loss, as for :func:`fastokd.ops.mixture_distillation`.

    Raises:
        UserError: an unknown method or option, or a shape that the method doesn't support.
    """
    check_options(name, options)
    return method_class(name)(shape, **{"impl": impl, **options})


__all__ = [
    "Method",
    "MethodLoss",
    "Needs",
    "OptimGroup",
    "Progress",
    "check_options",
    "create_method",
    "is_loaded",
    "known_needs",
    "list_methods",
    "method_class",
    "option_defaults",
    "ramp_weight",
    "register_method",
]
