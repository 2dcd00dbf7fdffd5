"""Finds the trained teachers of a run and fits them to its data."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastokd.checkpoint import read_object
from fastokd.data import DatasetSplits
from fastokd.data.held_out import DATA, DEFAULT
from fastokd.errors import UserError
from fastokd.recipe.names import Recipe, recipe
from fastokd.student.class_names import places_of
from fastokd.student.file import read_weights
from fastokd.student.teacher_file import CLASSES, file_of, names_of, read_teacher, taken_from
from fastokd.student.translated import Averaged, Translated
from fastokd.student.weights import STUDENT, Weights

# A copy of the teacher in the run folder, so that a resume needs no other file; of several the first.
KEPT = "teacher.safetensors"
# Of a set of small grey pictures: a teacher of one reads no others.
OF_SMALL_PICTURES = ("native_size", "border", "grey", "levels")


def teacher_recipe(student: Recipe, **changes: Any) -> Recipe:
    """The recipe that trains the teacher of ``student``: seed 0, the same images held out.

    ``changes`` are passed to :func:`fastokd.recipe`.
    """
    return recipe(student.teacher, seed=0, val=student.val, test=student.test, **changes)


def default_path(recipe: Recipe) -> Path:
    """The default run folder of :func:`teacher_recipe`."""
    return Path("runs") / f"{recipe.teacher.replace('/', '-')}-seed0"


def find_teachers(recipe: Recipe, given: Sequence[str], kept: Path | None) -> tuple[Weights, ...]:
    """Reads the teachers of a run.

    Args:
        recipe: a recipe whose method needs a teacher.
        given: what the user named (:func:`read_teacher`); none for the :func:`default_path`.
        kept: a resumed run's folder. Its copies are used first if it has some.

    Raises:
        UserError: there is no teacher (the message says how to train it), or it can't be read.
    """
    if kept is not None and (copies := kept_teachers(kept)):
        return copies
    names = names_of(given) or [str(default_path(recipe))]
    for name in names:
        path = file_of(name)
        if path is not None and not path.exists():
            raise UserError(
                f"{recipe.method} needs a trained teacher, and there is none at {path}: train one with "
                f"`{_command(recipe)}`, or name a run, a {STUDENT} or torchvision:NAME=FILE with --teacher"
            )
    return tuple(read_teacher(name) for name in names)


def kept_paths(folder: Path, count: int) -> list[Path]:
    """Where a run's folder has the copies of ``count`` teachers."""
    further = [KEPT.replace(".", f"-{index}.") for index in range(2, count + 1)]
    return [folder / name for name in (KEPT, *further)[:count]]


def kept_teachers(folder: Path) -> tuple[Weights, ...]:
    """The copies of the teachers in a run's folder; none of a run without."""
    if not (folder / KEPT).is_file():
        return ()
    first = read_weights(folder / KEPT)
    count = first.fact("teachers") if "teachers" in first.facts else 1
    return (first, *(read_weights(path) for path in kept_paths(folder, count)[1:]))


def to_keep(folder: Path, teachers: Sequence[Weights]) -> list[Weights]:
    """The copies of the teachers that a run's folder keeps, and where."""
    count = {"teachers": json.dumps(len(teachers))} if len(teachers) > 1 else {}
    return [
        Weights(
            path,
            teacher.state,
            {**teacher.facts, "taken_from": json.dumps(taken_from(teacher)), **count},
        )
        for path, teacher in zip(kept_paths(folder, len(teachers)), teachers, strict=True)
    ]


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


def build_teachers(teachers: Sequence[Weights], data: DatasetSplits) -> nn.Module:
    """One classifier of the data's normalised images: the teacher, or the mean of their logits.

    Raises:
        UserError: as :func:`build_teacher`.
    """
    built = [build_teacher(weights, data) for weights in teachers]
    return built[0] if len(built) == 1 else Averaged(built)


def build_teacher(weights: Weights, data: DatasetSplits) -> nn.Module:
    """The teacher network, translated where its classes or its preprocessing differ from the data's.

    Raises:
        UserError: it lacks one of the data's classes, was trained on the small grey pictures of another
            set, or its weights don't fit its model.
    """
    path, ours = weights.path, list(data.class_names)
    places: list[int] | None = None
    if CLASSES in weights.facts:
        count = weights.fact(CLASSES)
        if count != len(ours):
            raise UserError(
                f"the teacher {path} has {count} classes without names, and {data.name} has "
                f"{len(ours)}: name one trained on {data.name}"
            )
        net = weights.build(class_count=count)
        shown = weights.preprocessing
    else:
        theirs = weights.fact("class_names")
        shown = weights.preprocessing
        chosen = places_of(ours, theirs, str(path), data.name)
        places = None if chosen == list(range(len(theirs))) else chosen
        differing = shown.differences(data.preprocessing)
        for name in OF_SMALL_PICTURES if shown.native_size else ("grey",):
            if name in differing:
                value, here = getattr(shown, name), getattr(data.preprocessing, name)
                raise UserError(
                    f"the teacher {path} was trained on images whose {name} is {value}, and "
                    f"{data.name}'s is {here}: train one on {data.name}"
                )
        net = weights.build()
    if places is None and not {"mean", "std", "input_size"} & {
        *shown.differences(data.preprocessing)
    }:
        return net
    return Translated(net, shown, data.preprocessing, places).eval()
