"""A trained, frozen teacher: where it lies, and whether it fits the data.

A teacher is any run folder of ours (its student), one of its checkpoints (the student that the
checkpoint's recipe keeps), or a ``student.safetensors``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastokd.checkpoint import load_checkpoint, newest_checkpoint
from fastokd.data import DatasetSplits
from fastokd.errors import UserError
from fastokd.models import Student, create_model
from fastokd.recipe_type import Recipe

STUDENT = "student.safetensors"
# A run keeps the teacher that it had, so that it can be resumed without it.
KEPT = "teacher.safetensors"


@dataclass(frozen=True)
class Weights:
    """One student's state and what it says of itself (the metadata of a ``student.safetensors``)."""

    path: Path
    state: dict[str, Tensor]
    facts: dict[str, str]


def student_facts(recipe: Recipe, data: DatasetSplits, student: int) -> dict[str, str]:
    """What a student's file says: its model, the classes and the normalisation of its images."""
    return {
        "model": recipe.models[student],
        "model_options": json.dumps(recipe.model_options),
        "class_names": json.dumps(list(data.class_names)),
        "mean": json.dumps(list(data.mean)),
        "std": json.dumps(list(data.std)),
        "student": str(student),
    }


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


def read_weights(path: Path) -> Weights:
    """A student from a run folder, a checkpoint or a ``student.safetensors``."""
    if path.is_file():
        return _from_file(path)
    if (path / STUDENT).is_file():
        return _from_file(path / STUDENT)
    if (path / "checkpoints").is_dir():
        newest, tensors, facts, _ = newest_checkpoint(path / "checkpoints")
        return _from_checkpoint(newest, tensors, facts)
    if path.is_dir() and (path / "manifest.json").is_file():
        return _from_checkpoint(path, *load_checkpoint(path))
    raise UserError(f"{path} is no run, checkpoint or {STUDENT}: name one of them")


def _from_file(path: Path) -> Weights:
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return Weights(
                path, {name: file.get_tensor(name) for name in names}, file.metadata() or {}
            )
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} can't be read as a {STUDENT}: {error}; an author's .pth is turned into one "
            "by `fastokd convert`"
        ) from error


def _from_checkpoint(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Weights:
    recipe = Recipe.from_json(facts["recipe"])
    student = recipe.kept_student
    state = {
        key.removeprefix(prefix): value
        for prefix in ("cohort.trunk.", f"cohort.students.{student}.")
        for key, value in tensors.items()
        if key.startswith(prefix)
    }
    said = {
        "model": recipe.models[student],
        "model_options": json.dumps(recipe.model_options),
        **{name: json.dumps(facts[name]) for name in ("class_names", "mean", "std")},
        "student": str(student),
    }
    return Weights(path, state, said)


def build_teacher(weights: Weights, data: DatasetSplits) -> Student:
    """The network, after checking that it means these classes and reads such images.

    Raises:
        UserError: classes in another number or order, images normalised otherwise, weights that
            don't fit the model that the file names.
    """
    path, facts = weights.path, weights.facts
    said = {name: _fact(weights, name) for name in ("class_names", "mean", "std")}
    ours, theirs = list(data.class_names), said["class_names"]
    if theirs != ours:
        what = (
            f"{len(theirs)} classes, and {data.name} has {len(ours)}"
            if len(theirs) != len(ours)
            else f"classes of other names or in another order than {data.name}'s"
        )
        raise UserError(f"the teacher {path} knows {what}: train one on {data.name}")
    for name, value in (("mean", data.mean), ("std", data.std)):
        if not _close(said[name], value):
            raise UserError(
                f"the teacher {path} was trained on images normalised by {name} {said[name]}, and "
                f"{data.name}'s is {list(value)}: it would see other images; train one on "
                f"{data.name}"
            )
    options = json.loads(facts.get("model_options", "{}"))
    model = create_model(_model(weights), len(ours), **options)
    try:
        model.load_state_dict(weights.state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"the teacher {path} is no {facts['model']}: {first}") from error
    return model


def _close(theirs: Any, ours: tuple[float, ...]) -> bool:
    return len(theirs) == len(ours) and all(
        abs(a - b) < 1e-6 for a, b in zip(theirs, ours, strict=True)
    )


def _model(weights: Weights) -> str:
    if "model" not in weights.facts:
        raise UserError(f"the teacher {weights.path} doesn't say its model: take a run's {STUDENT}")
    return weights.facts["model"]


def _fact(weights: Weights, name: str) -> Any:
    if name not in weights.facts:
        raise UserError(
            f"the teacher {weights.path} doesn't say its {name}: take a run's {STUDENT}"
        )
    return json.loads(weights.facts[name])
