"""A trained, frozen teacher: where it lies, and whether it fits the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastokd.data import DatasetSplits
from fastokd.errors import UserError
from fastokd.models import Student
from fastokd.recipe.names import Recipe, recipe
from fastokd.student.file import read_weights
from fastokd.student.weights import STUDENT, Weights

# A run keeps the teacher that it had, so that it can be resumed without it.
KEPT = "teacher.safetensors"


def teacher_recipe(student: Recipe, **changes: Any) -> Recipe:
    """What trains the teacher of ``student``: at seed 0, with the same images held out.

    ``changes`` as :func:`fastokd.recipe` takes them.
    """
    return recipe(student.teacher, seed=0, val=student.val, **changes)


def default_path(recipe: Recipe) -> Path:
    """Where :func:`teacher_recipe` leaves it."""
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
            f"`{_command(recipe)}`, or name a run or a {STUDENT} with --teacher"
        )
    return read_weights(path)


def _command(student: Recipe) -> str:
    val = f" --val {student.val}" if student.val else ""
    return f"fastokd train {student.teacher}{val}"


def check_held_out(weights: Weights, data: DatasetSplits, what: str, recipe: Recipe) -> bool:
    """Whether ``weights`` are known not to have seen the images that ``data`` holds out of train.

    One ``val`` of one data set is one choice of images, whatever the seeds. ``what`` is how the
    weights came here.

    Raises:
        UserError: they have seen them.
    """
    if not data.held_out:
        return True
    if "val" not in weights.facts or "dataset" not in weights.facts:
        return False
    if weights.fact("dataset") == data.name and weights.fact("val") != data.held_out:
        also = f"train one with `{_command(recipe)}`, " if recipe.teacher else ""
        raise UserError(
            f"{what} {weights.path} has seen images that --val {data.held_out} holds out, since its "
            f"own training held out {weights.fact('val') or 'none'}: {also}or leave --val out"
        )
    return True


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
