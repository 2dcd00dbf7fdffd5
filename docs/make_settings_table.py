"""Writes the tables of docs/recipes.md: every field of a recipe, every option of a method and a student.

    python docs/make_settings_table.py

Types, defaults and meanings are the code's: the annotations of ``Recipe``, and the signatures and docstrings of
methods and students. ``tests/recipe/test_settings_table.py`` fails where the page differs.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fastokd.methods import list_methods, method_class, option_defaults
from fastokd.models import list_models, model_spec
from fastokd.models import option_defaults as model_options
from fastokd.models.external import ExternalStudent
from fastokd.recipe.recipe import Recipe, settings

PAGE = Path(__file__).parent / "recipes.md"
BEGIN, END = "<!-- make_settings_table.py -->\n", "<!-- end -->\n"


def written_in(owner: type) -> dict[str, str]:
    """The meaning of each argument in the docstrings of a class and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        text = inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2].split("\n\n")[0]
        for name, meaning in re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", text, re.M | re.S):
            found[name] = " ".join(meaning.split())
    return found


def recipe_rows() -> Iterable[str]:
    defaults = {f.name: f for f in dataclasses.fields(Recipe)}
    for name, setting in settings().items():
        kind, field = setting.type, defaults[name]
        if get_origin(kind) is Literal:
            said = " or ".join(get_args(kind))
        else:
            said = kind.__name__ if isinstance(kind, type) else str(kind).replace("|", "or")
            if get_origin(kind) is dict:
                said = "object"
            elif get_origin(kind) is tuple:
                said = f"list of {get_args(kind)[0].__name__}"
        if field.default is not dataclasses.MISSING:
            default = shown(field.default)
        else:
            default = "by the method" if "options" in name or name == "students" else "by the name"
            default = "by the name, or none" if name == "model_options" else default
        yield f"| `{name}` | {said} | {default} | {setting.meaning} |"


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:g}"
    return str(list(value)) if isinstance(value, tuple) else str(value or "none")


def option_rows(owners: dict[str, tuple[dict[str, Any], dict[str, str]]]) -> Iterable[str]:
    """A row for each option: its defaults, who has it, what it means."""
    for option in sorted({option for defaults, _ in owners.values() for option in defaults}):
        having = [name for name, (defaults, _) in owners.items() if option in defaults]
        values: dict[str, list[str]] = {}
        for name in having:
            values.setdefault(shown(owners[name][0][option]), []).append(name)
        usual = max(values, key=lambda value: len(values[value]))
        others = (
            f"; {value}: {', '.join(names)}" for value, names in values.items() if value != usual
        )
        meaning = owners[having[0]][1][option].replace("``", "`").replace("|", "\\|")
        yield f"| `{option}` | {usual}{''.join(others)} | {who(having, owners)} | {meaning} |"


def who(having: list[str], owners: Iterable[str]) -> str:
    """The names that have an option, or those that don't where they are fewer."""
    without = [name for name in owners if name not in having]
    return ", ".join(having) if len(having) <= len(without) else f"all but {', '.join(without)}"


def method_rows() -> Iterable[str]:
    return option_rows(
        {m: (option_defaults(m), written_in(method_class(m))) for m in list_methods()}
    )


def model_rows() -> Iterable[str]:
    owners = {}
    for name in list_models():
        build = model_spec(name).build
        owner = build.func if isinstance(build, partial) else build
        owners[name] = (model_options(name), written_in(owner))
    theirs = {"split_at": None, "input_size": None}
    owners["torchvision:NAME"] = owners["timm:NAME"] = (theirs, written_in(ExternalStudent))
    return option_rows(owners)


def tables() -> str:
    parts = ["| setting | type | default | meaning |", "|---|---|---|---|", *recipe_rows(), ""]
    parts += ["| option of a method | default | methods | meaning |", "|---|---|---|---|"]
    parts += [*method_rows(), "", "| option of a student | default | students | meaning |"]
    return "\n".join([*parts, "|---|---|---|---|", *model_rows()]) + "\n"


def page(text: str) -> str:
    """The page with the tables between its two marks."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + tables() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
