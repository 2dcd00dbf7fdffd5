"""The commands ``list``, ``model-info`` and ``doctor``, which print facts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

import fastokd
from fastokd.commands.options import Json
from fastokd.errors import unknown_name


def list_(
    what: Annotated[
        str | None,
        typer.Argument(
            help="models, methods, datasets, recipes, styles (DATASET@STYLE) or settings (--set); by default "
            "how many of each."
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """List the names that recipes take."""
    lists: dict[str, Callable[[], Iterable[str]]] = {
        "models": fastokd.list_models,
        "methods": fastokd.list_methods,
        "datasets": fastokd.list_datasets,
        "recipes": fastokd.list_recipes,
        "styles": _styles,
        "settings": _settings,
    }
    if what is None:
        every = {name: [*names()] for name, names in lists.items()}
        short = (f"{len(names):4} {name}: fastokd list {name}" for name, names in every.items())
        print(json.dumps(every) if json_ else "\n".join(short))
        return
    if what not in lists:
        raise unknown_name("list", what, lists)
    names = lists[what]()
    if json_:
        print(json.dumps([*names]))
    elif isinstance(names, dict):
        print_facts(names, as_json=False)
    else:
        print("\n".join(names))


def _styles() -> dict[str, str]:
    """Each style's source."""
    from fastokd.recipe.styles import STYLES

    return {name: style.source for name, style in STYLES.items()}


def _settings() -> dict[str, str]:
    """Each setting's meaning."""
    from fastokd.recipe.recipe import settings

    return {name: setting.meaning for name, setting in settings().items()}


def model_info(
    name: Annotated[str, typer.Argument(help="A model; `fastokd list models`.")],
    num_classes: Annotated[int, typer.Option(help="Number of classes.")] = 100,
    json_: Json = False,
) -> None:
    """Print a student's parameters, MACs, feature width, maps."""
    from fastokd.models import model_info as count

    info = dataclasses.asdict(count(name, num_classes))
    print_facts(info, json_)


def doctor(json_: Json = False) -> None:
    """Check what works on this machine, and why the rest doesn't."""
    from fastokd.doctor import diagnose

    print_facts(diagnose(), json_)


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """One fact a line, those within another indented; or all as JSON."""
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:", *(f"\n  {key}: {inner}" for key, inner in value.items()), sep="")
        else:
            print(f"{name}: {f'{value:.4g}' if isinstance(value, float) else value}")
