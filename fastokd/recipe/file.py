"""A recipe in a TOML file: the name of the recipe that it changes, and settings by their names.

    recipe = "okddip-branch/resnet32/cifar100"
    epochs = 30
    temperature = 4.0

Settings are those of ``--set``: fields of a recipe, and options of the method and of the students.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastokd.errors import UserError, wrong_type
from fastokd.known import METHODS
from fastokd.recipe.changes import NAMED
from fastokd.recipe.recipe import Recipe
from fastokd.recipe.unused import unused

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# The key of the recipe that a file changes.
BASE = "recipe"
ENDING = ".toml"
# A recipe's file is a few lines: a larger one was named by mistake.
MOST_BYTES = 1 << 20


def is_file(name: str) -> bool:
    """Whether ``name`` is a recipe's file, not a recipe's name."""
    return name.endswith(ENDING)


def label(name: str) -> str:
    """A word for folders: a recipe's name without slashes, or the stem of its file."""
    return Path(name).stem if is_file(name) else name.replace("/", "-")


def read_recipe(path: str) -> tuple[str, dict[str, Any]]:
    """The name of the recipe that a file changes, and its settings.

    Raises:
        UserError: the file can't be read, isn't TOML or names no recipe.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"can't read the recipe {path}: {error.strerror or error}") from error
    if len(content) > MOST_BYTES:
        raise UserError(f"{path} has more than {MOST_BYTES:,} bytes: name a recipe's file")
    try:
        values = tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also of numbers with too many digits
        raise UserError(
            f"{path} isn't TOML: {error}; `fastokd train NAME --print-recipe toml` writes one"
        ) from error
    base = values.pop(BASE, None)
    if base is None:
        raise UserError(
            f'{path} names no recipe: begin it with the one that it changes, as in {BASE} = "okddip-branch/'
            'resnet32/cifar100"'
        )
    if not isinstance(base, str) or is_file(base):
        raise wrong_type(BASE, base, "a recipe's name, METHOD/MODEL/DATASET")
    for name in set(NAMED) & values.keys() - {"method"}:
        raise UserError(f"{path} sets {name}, which the recipe's name says: change {BASE} instead")
    return base, values


def as_toml(recipe: Recipe, base: Recipe) -> str:
    """``recipe`` as the text of a file that changes ``base``: all settings that have a meaning in it,
    first those that differ."""
    base_name, own = recipe.name, {}
    if recipe.method not in METHODS:  # a user's, whose name no recipe's name holds
        base_name, own = base.name, {"method": recipe.method}
    left_out = {*NAMED, *unused(recipe)}
    values = {k: v for k, v in recipe.to_json().items() if k not in left_out}
    before = base.to_json()
    differing = {**own, **{k: v for k, v in values.items() if v != before[k]}}
    text = f"{BASE} = {_literal(base_name)}\n"
    for title, part in (
        ("What differs from that recipe", differing),
        ("Its other settings", {k: v for k, v in values.items() if k not in differing}),
    ):
        if part:
            text += f"\n# {title}.\n"
            text += "".join(f"{key} = {_literal(value)}\n" for key, value in part.items())
    return text


def _literal(value: Any) -> str:
    """A value of JSON in TOML."""
    if isinstance(value, dict):
        entries = ", ".join(f"{_key(k)} = {_literal(v)}" for k, v in value.items())
        return f"{{ {entries} }}" if entries else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, str):
        # TOML's basic strings escape as JSON's do, but for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if bare else _literal(name)
