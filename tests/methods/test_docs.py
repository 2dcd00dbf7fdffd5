"""The pages of the methods: one for each, their pictures as drawn now, their commands' recipes real."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from fastokd.methods import list_methods, option_defaults
from fastokd.recipe.names import recipe
from fastokd.recipe.settings import parse_settings

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted([*(DOCS / "methods").glob("*.md"), DOCS / "methods.md", DOCS / "recipes.md"])


def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "make_score_pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_its_page() -> None:
    for name in list_methods():
        page = DOCS / "methods" / f"{name}.md"
        if not page.is_file():
            ablations = (DOCS / "methods" / "okddip_ablations.md").read_text()
            assert f"## {name}:" in ablations, name
        assert name.removeprefix("okddip") in (DOCS / "methods.md").read_text(), name


def test_pictures_are_of_the_scores_as_they_are() -> None:
    module = pictures()
    for name, picture in module.PICTURES.items():
        committed = (DOCS / "methods" / f"{name}.svg").read_text()
        assert module.draw(picture) == committed, f"run docs/make_score_pictures.py: {name}"
    drawn = {picture.method for picture in module.PICTURES.values()}
    assert drawn | {"ffsd"} == set(list_methods())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_recipes_are_real(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).is_file(), target
    for file in re.findall(r"`(fastokd/[\w/]+\.py)`", text):
        assert (DOCS.parent / file).is_file(), file
    for command in re.findall(r"^    fastokd train (.+)$", text, flags=re.MULTILINE):
        name, *flags = command.split()
        if name.endswith(".toml"):  # which an earlier command of the page writes
            continue
        settings = [flags[i + 1] for i, flag in enumerate(flags) if flag == "--set"]
        values = {key: options[0] for key, options in parse_settings(settings).items()}
        recipe(name, **values)


def test_options_named_on_a_page_exist() -> None:
    for name in ("dml", "one", "okddip", "okddip_kd", "kdcl"):
        text = (DOCS / "methods" / f"{name}.md").read_text()
        named = set(re.findall(r"`(\w+)=[^`]*`", text)) - {"mixture_ce_weight", "trunk_grad_scale"}
        assert named <= set(option_defaults(name)), name


def test_the_table_of_forms_is_true() -> None:
    for name in ("ind", "cl_ilr", "one"):
        assert recipe(f"{name}/resnet8/digits").sharing == "branch"
    for name in ("dml", "kd", "kdcl", "ffsd"):
        assert recipe(f"{name}/resnet8/digits").sharing == "network"
