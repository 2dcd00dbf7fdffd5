"""A trained, frozen teacher: where it lies, and whether it fits the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastokd.data import DatasetSplits
from fastokd.errors import UserError
from fastokd.models import Student
from fastokd.recipe_type import Recipe
from fastokd.student_file import STUDENT, Weights, read_weights

# A run keeps the teacher that it had, so that it can be resumed without it.
KEPT = "teacher.safetensors"


def default_path(recipe: Recipe) -> Path:
    """Where the recipe that trains the teacher leaves it, at its default seed."""
    return Path("runs") / f"{recipe.teacher.replace('/', '-')}-seed0"


def find_teacher(recipe: Recipe, given: Path | None, kept: Path | None) -> Weights:
    """The teacher of a run.

    Args:
        recipe: a recipe whose method needs one.
        given: what the user named; else ``kept``, what a resumed run has kept; else the default
            run folder of the recipe that trains it.

    Raises:
        UserError: there is none; the message says how to train it. It can't be read.
    """
    if kept is not None and kept.is_file():
        return read_weights(kept)
    path = given or default_path(recipe)
    if not path.exists():
        raise UserError(
            f"{recipe.method} needs a trained teacher, and there is none at {path}: train one with "
            f"`fastokd train {recipe.teacher}`, or name a run or a {STUDENT} with --teacher"
        )
    return read_weights(path)


def build_teacher(weights: Weights, data: DatasetSplits) -> Student:
    """The network, after checking that it means these classes and reads such images.

    Raises:
        UserError: classes in another number or order, images of another preprocessing, weights
            that don't fit the model that the file names.
    """
    path = weights.path
    ours, theirs = list(data.class_names), weights.fact("class_names")
    shown = weights.preprocessing
    if theirs != ours:
        what = (
            f"{len(theirs)} classes, and {data.name} has {len(ours)}"
            if len(theirs) != len(ours)
            else f"classes of other names or in another order than {data.name}'s"
        )
        raise UserError(f"the teacher {path} knows {what}: train one on {data.name}")
    for name in shown.differences(data.preprocessing):
        value, here = getattr(shown, name), getattr(data.preprocessing, name)
        by = f"normalised by {name}" if name in ("mean", "std") else f"whose {name} is"
        raise UserError(
            f"the teacher {path} was trained on images {by} {_shown(value)}, and {data.name}'s is "
            f"{_shown(here)}: it would see other images; train one on {data.name} as it is shown here"
        )
    return weights.build()


def _shown(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)
