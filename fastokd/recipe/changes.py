"""Settings that a user gives by name: to which part of a recipe each belongs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastokd.errors import UserError, unknown_name
from fastokd.known import METHODS, RUN_OPTIONS
from fastokd.recipe.fields import as_float
from fastokd.recipe.recipe import Recipe, checked, methods, models, settings

# Fields that the recipe's name sets.
NAMED = ("name", "method", "model", "dataset", "sharing")
# Options of the command `train` that are neither settings nor options of a run.
OF_THE_COMMAND = ("seeds", "set", "scale_lr", "print_recipe")


def changed_fields(base: Recipe, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changed fields of ``base``; options are merged into ``method_options`` or ``model_options``.

    Raises:
        UserError: an unknown setting; one that the method and the students have, or only some of the
            students; a value of the wrong type; two values for one setting.
    """
    found = {key: checked(key, value) for key, value in changes.items() if key in settings()}
    given = {part: dict(found.pop(part, {})) for part in ("method_options", "model_options")}
    of_method = methods.option_defaults(base.method)
    of_models = {name: models.option_defaults(name) for name in dict.fromkeys(base.models)}
    for key, value in changes.items():
        if key in settings():
            continue
        without = [name for name, options in of_models.items() if key not in options]
        in_models = len(without) < len(of_models)
        if key in of_method and in_models:
            raise UserError(
                f"{key} is an option of the method {base.method} and of the model {base.model}: give "
                f"it within method_options or model_options, as model_options={{{key!r}: {value!r}}}"
            )
        if in_models and without:
            raise UserError(
                f"{key} is no option of {' and '.join(without)}: the students of a mixed cohort share "
                "their options, so leave it out"
            )
        if key not in of_method and not in_models:
            raise _unknown(base, key, value)
        options = given["method_options" if key in of_method else "model_options"]
        if key in options and options[key] != value:
            raise UserError(f"{key} is both {options[key]} and {value}: leave one of them out")
        default = of_method[key] if key in of_method else of_models[base.models[0]][key]
        to_float = type(value) is int and type(default) is float
        options[key] = as_float(key, value) if to_float else value
    for part, options in given.items():
        if options:
            found[part] = {**getattr(base, part), **options}
    return found


def _unknown(base: Recipe, key: str, value: Any) -> UserError:
    """The error for a setting that this recipe doesn't have."""
    if key in (*RUN_OPTIONS, *OF_THE_COMMAND):
        in_python = f", or as {key}= to fastokd.train" if key in RUN_OPTIONS else ""
        return UserError(
            f"{key} isn't a setting of the recipe but an option of the run: give it as "
            f"{option(key)} on the command line{in_python}"
        )
    of_method = methods.option_defaults(base.method)
    having = [method for method in METHODS if key in methods.option_defaults(method)]
    if having:
        own = f"its options are {', '.join(of_method)}" if of_method else "it has none"
        return UserError(f"{base.method} has no option {key!r} ({own}): leave it out")
    known = [name for name in settings() if name not in NAMED]
    of_models = (name for student in base.models for name in models.option_defaults(student))
    return unknown_name("setting", key, {*known, *of_method, *of_models})


def option(name: str) -> str:
    """The command-line option of a setting."""
    return f"--{name.replace('_', '-')}"


def is_setting(key: str) -> bool:
    """Whether ``key`` is a field of a recipe or an option of a method or of a student of this package."""
    owners = (
        *map(methods.option_defaults, METHODS),
        *map(models.option_defaults, models.list_models()),
    )
    return key in settings() or any(key in options for options in owners)
