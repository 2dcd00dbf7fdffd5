"""The methods by name."""

from __future__ import annotations

import inspect
import math
import numbers
import os
import traceback
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from fastokd.cohort import CohortShape
from fastokd.errors import UserError, in_one_line, unknown_name, wrong_type
from fastokd.known import METHODS, list_methods, load
from fastokd.methods.base import INDEX, Method, MethodLoss, Needs, OptimGroup, Progress, ramp_weight
from fastokd.methods.label_loss import LabelLoss

# Classes of users, by ``package.module:Class``.
_OWN: dict[str, type[Method]] = {}
# What every recipe fulfils.
_FULFILLED = Needs(min_students=1, leader=True, label_loss=True, mixed_labels=True)


def register_method(name: str) -> type[Method]:
    """Registers a user's class as a method under its name, ``package.module:Class``.

    The module is imported. Names in recipes that are read from files are never passed here, so that
    files run no code.

    Raises:
        UserError: there is no such module or class, its code can't be imported, or the class is no
            :class:`Method`.
    """
    module, _, wanted = name.partition(":")
    if not module or not wanted:
        raise UserError(f"--method is {name!r}: name it as package.module:Class")
    try:
        home = import_module(module)
    except Exception as error:  # raised by the user's own code
        raise UserError(f"--method {name} can't be loaded: {_why_not(module, error)}") from error
    found = getattr(home, wanted, None)
    if found is None:
        classes = [
            key for key, value in vars(home).items() if _is_method(value) and value is not Method
        ]
        where = getattr(home, "__file__", None) or module
        own = f"its methods are {', '.join(classes)}" if classes else "it has no methods"
        raise UserError(f"--method {name} can't be loaded: {where} has no {wanted} ({own})")
    if not _is_method(found):
        raise UserError(f"--method {name} is no subclass of fastokd.methods.Method: make it one")
    own_class: type[Method] = found
    _OWN[name] = own_class
    return own_class


def _is_method(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Method)


def _why_not(module: str, error: Exception) -> str:
    """Why the user's ``module`` can't be imported, and where it was looked for."""
    if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
        missing = str(error.name)
        if "." in missing:
            return f"{missing.rpartition('.')[0]} has no module {missing.rpartition('.')[2]}"
        return (
            f"there is no {missing}.py or package {missing} in the working directory {os.getcwd()}, "
            "nor in PYTHONPATH or among the installed packages; change to the folder that holds it"
        )
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.name == "<module>"]
    line = f" (line {lines[-1]})" if lines else ""
    return f"importing {module} raised {in_one_line(error)}{line}; --debug shows where"


def is_loaded(name: str) -> bool:
    """False for a user's method, ``package.module:Class``, that isn't registered. The recipe and the
    metrics of its runs can be read, but they can't be trained on or evaluated."""
    return ":" not in name or name in _OWN


def known_needs(name: str) -> Needs:
    """What a method needs; of one that isn't loaded (:func:`is_loaded`), what every recipe fulfils."""
    return method_class(name).needs if is_loaded(name) else _FULFILLED


def method_class(name: str) -> type[Method]:
    """The class of one method; an unknown name raises and offers the nearest ones."""
    if name in _OWN:
        return _OWN[name]
    if ":" in name:
        raise UserError(
            f"the method {name} is custom code, which a recipe alone doesn't load: add --method {name}, "
            f"or call fastokd.methods.register_method({name!r}) in Python"
        )
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    found: type[Method] = load(METHODS[name])
    return found


def option_defaults(name: str) -> dict[str, Any]:
    """The options of a method, those of its base classes included, and their defaults."""
    return {name: option.default for name, option in _options(name).items()}


def _options(name: str) -> dict[str, inspect.Parameter]:
    found: dict[str, inspect.Parameter] = {}
    for owner in reversed(method_class(name).__mro__):
        if "__init__" in vars(owner):
            parameters = inspect.signature(vars(owner)["__init__"]).parameters.values()
            found |= {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    found.pop("impl", None)
    return dict(sorted(found.items()))


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Checks the names and the values of the options of a method that is loaded.

    Raises:
        UserError: an unknown option, or a value of the wrong type or out of range.
    """
    if not is_loaded(name):
        return
    known = _options(name)
    defaults = {name: option.default for name, option in known.items()}
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
        elif isinstance(default, float) or known[option].annotation == "float | None":
            fits = isinstance(value, numbers.Real) and 0 <= float(value) < math.inf
            what = "a finite number, at least 0"
        else:
            fits = isinstance(value, numbers.Integral) and int(value) >= 1
            what = "a whole number, at least 1"
        if not fits or (isinstance(value, bool) and not isinstance(default, bool)):
            raise wrong_type(option, value, what)


def create_method(
    name: str,
    shape: CohortShape,
    *,
    impl: str = "auto",
    label_loss: LabelLoss | None = None,
    **options: Any,
) -> Method:
    """A method for a cohort of this shape.

    ``impl``: the implementation of its loss, as for :func:`fastokd.ops.mixture_distillation`;
    ``label_loss``: the settings of its terms with labels, by default plain cross-entropies.

    Raises:
        UserError: an unknown method or option, a shape that the method doesn't support, or a
            ``label_loss`` for a method that doesn't use it.
    """
    check_options(name, options)
    method = method_class(name)(shape, **{"impl": impl, **options})
    if label_loss is not None:
        if not method.needs.label_loss:
            raise UserError(
                f"{name} doesn't use the settings of the loss on labels: leave them at their defaults, "
                "or write self.label_loss into its losses and needs = Needs(label_loss=True)"
            )
        method.label_loss = label_loss
    return method


__all__ = [
    "INDEX",
    "LabelLoss",
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
