"""Finds a trained teacher and checks that it fits the data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastokd.checkpoint import read_object
from fastokd.data import DatasetSplits
from fastokd.data.held_out import DATA, DEFAULT
from fastokd.errors import UserError
from fastokd.models import Student
from fastokd.recipe.names import Recipe, recipe
from fastokd.student.file import read_weights
from fastokd.student.weights import STUDENT, Weights

# A copy of the teacher in the run folder, so that a resume needs no other file.
KEPT = "teacher.safetensors"


def teacher_recipe(student: Recipe, **changes: Any) -> Recipe:
    """The recipe that trains the teacher of ``student``: seed 0, the same images held out.

    ``changes`` are passed to :func:`fastokd.recipe`.
    """
    return recipe(student.teacher, seed=0, val=student.val, test=student.test, **changes)


def default_path(recipe: Recipe) -> Path:
    """The default run folder of :func:`teacher_recipe`."""
    return Path("runs") / f"{recipe.teacher.replace('/', '-')}-seed0"


def find_teacher(recipe: Recipe, given: Path | None, kept: Path | None) -> Weights:
    """Reads the teacher of a run.

    Args:
        recipe: a recipe whose method needs a teacher.
        given: the path that the user named; None for the :func:`default_path`.
        kept: the copy in a resumed run's folder. It is used first if it exists.

    Raises:
        UserError: there is no teacher (the message says how to train it), or it can't be read.
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
    held = "".join(f" --{n} {v}" for n, v in (("val", student.val), ("test", student.test)) if v)
    return f"fastokd train {student.teacher}{held}"


def said_held_out(data: DatasetSplits) -> str:
    """The options that hold out what ``data`` holds out of train."""
    return " ".join(
        f"--{name} {share}" for name, share in sorted(data.held_out.items(), reverse=True)
    )


def check_held_out(weights: Weights, data: DatasetSplits, what: str, recipe: Recipe) -> bool:
    """Whether ``weights`` are known not to be trained on the images that ``data`` holds out.

    A data set, ``val`` and ``test`` determine the held-out images; the seed doesn't. ``what``
    describes the weights in the message.

    Raises:
        UserError: they were trained on them.
    """
    if not data.held_out:
        return True
    if "val" not in weights.facts or "dataset" not in weights.facts:
        return False
    theirs = {name: weights.fact(name) if name in weights.facts else 0 for name in data.held_out}
    if len(theirs) > 1:  # of a folder that is always split
        theirs = {name: share or DEFAULT for name, share in theirs.items()}
    if weights.fact("dataset") == data.name and theirs != data.held_out:
        also = f"train one with `{_command(recipe)}`, " if recipe.teacher else ""
        raise UserError(
            f"{what} {weights.path} was trained on images that {said_held_out(data)} holds out, since "
            f"its training held out {' and '.join(str(v or 'none') for v in theirs.values())}: {also}or "
            f"leave {' and '.join(f'--{name}' for name in theirs)} out"
        )
    return data.train.paths_N is None or _saw_other_files(weights, data, what)


def _saw_other_files(weights: Weights, data: DatasetSplits, what: str) -> bool:
    """Whether the lists of files of the run that trained ``weights`` are known and have no held-out file:
    files that were added since change the draw.

    Raises:
        UserError: it was trained on some.
    """
    runs = [folder for folder in weights.path.parents[:2] if (folder / "recipe.json").is_file()]
    lists = read_object(runs[0] / DATA, "list of the files") if runs else {}
    if "train" not in lists:
        return False
    drawn = {path for name in data.held_out for path in getattr(data, name).paths_N}
    seen = len(drawn & {os.fsencode(path) for path in lists["train"]})
    if seen:
        raise UserError(
            f"{what} {weights.path} was trained on {seen} of the {len(drawn)} images that are held out "
            "here, since the folder has changed: train it again"
        )
    return True


def build_teacher(weights: Weights, data: DatasetSplits) -> Student:
    """The teacher network.

    Raises:
        UserError: its classes or its preprocessing differ from the data's, or its weights don't fit
            its model.
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
        raise UserError(f"the teacher {path} has {what}: train one on {data.name}")
    for name in shown.differences(data.preprocessing):
        value, here = getattr(shown, name), getattr(data.preprocessing, name)
        by = f"normalised by {name}" if name in ("mean", "std") else f"whose {name} is"
        raise UserError(
            f"the teacher {path} was trained on images {by} {_shown(value)}, and {data.name}'s is "
            f"{_shown(here)}: train one on {data.name} with this preprocessing"
        )
    return weights.build()


def _shown(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)
