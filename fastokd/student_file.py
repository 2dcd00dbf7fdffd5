"""One student as it is kept: its weights, and what it says of itself.

It is read from a run folder of ours (its student), one of its checkpoints (the student that the
checkpoint's recipe keeps, or any other) or a ``student.safetensors``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastokd.checkpoint import list_checkpoints, load_checkpoint, newest_checkpoint
from fastokd.errors import UserError
from fastokd.models import Student, create_model
from fastokd.recipe_type import MOST, Recipe

STUDENT = "student.safetensors"


def _numbers(value: Any) -> bool:
    """Three finite numbers, one a channel."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(number) in (int, float) and math.isfinite(number) for number in value)
    )


def _size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST["image_size"]


# Files come from anywhere: what a fact must be like to be used.
_FITS: dict[str, Callable[[Any], bool]] = {
    "model_options": lambda value: isinstance(value, dict),
    "class_names": lambda value: (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    ),
    "mean": _numbers,
    "std": lambda value: _numbers(value) and min(value) > 0,
    "input_size": lambda value: _size(value) and value > 0,
    "eval_resize": _size,
    "val": lambda value: type(value) is int and value >= 0,
}


@dataclass(frozen=True)
class Weights:
    """One student's state and what it says of itself (the metadata of a ``student.safetensors``).

    ``facts``, each as JSON but the model: ``model``, ``model_options``, ``class_names``, ``mean``
    and ``std`` of its images in units of [0, 1], ``input_size`` (their height and width),
    ``eval_resize`` (the shorter side before the centre crop; 0 for the whole centre square),
    ``dataset`` and ``val`` (what it was trained on, and how many images were held out of that; files
    of older versions don't say it),
    ``student`` (its index) and ``role`` (why it is this one).
    """

    path: Path
    state: dict[str, Tensor]
    facts: dict[str, str]

    def fact(self, name: str) -> Any:
        """One of ``facts``, out of its JSON."""
        if name not in self.facts:
            raise UserError(f"{self.path} doesn't say its {name}: take a run's {STUDENT}")
        try:
            value = json.loads(self.facts[name])
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.path} is damaged: its {name} can't be read; take a run's {STUDENT}"
            ) from error
        if name in _FITS and not _FITS[name](value):
            raise UserError(
                f"{self.path} is damaged: its {name} is {str(value)[:80]}; take a run's {STUDENT}"
            )
        return value

    @property
    def model(self) -> str:
        """The student's model, by name."""
        if "model" not in self.facts:
            raise UserError(f"{self.path} doesn't say its model: take a run's {STUDENT}")
        return self.facts["model"]

    @property
    def options(self) -> dict[str, Any]:
        """Of the model's constructor."""
        return dict(self.fact("model_options")) if "model_options" in self.facts else {}

    def about(self) -> dict[str, Any]:
        """All that it says of itself, for JSON."""
        names = ("class_names", "mean", "std", "input_size", "eval_resize", "student", "role")
        return {
            "model": self.model,
            "model_options": self.options,
            **{name: self.fact(name) for name in names},
        }

    def build(self) -> Student:
        """The network with these weights, in eval mode; their keys ours or the publisher's.

        Raises:
            UserError: the weights don't fit the model that the file names.
        """
        model = create_model(self.model, len(self.fact("class_names")), **self.options)
        ours = {model.published_key(key): key for key in model.state_dict()}
        try:
            model.load_state_dict({ours.get(key, key): v for key, v in self.state.items()})
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise UserError(f"{self.path} is no {self.model}: {first}") from error
        return model.eval()


def student_facts(recipe: Recipe, data: Any, student: int) -> dict[str, str]:
    """What a student's file says of it; ``data`` has ``class_names``, ``mean`` and ``std``."""
    return _facts(recipe, data.class_names, data.mean, data.std, student)


def _facts(recipe: Recipe, names: Any, mean: Any, std: Any, student: int) -> dict[str, str]:
    return {
        "model": recipe.models[student],
        "model_options": json.dumps(recipe.model_options),
        "class_names": json.dumps(list(names)),
        "mean": json.dumps(list(mean)),
        "std": json.dumps(list(std)),
        "input_size": json.dumps(recipe.image_size),
        "eval_resize": json.dumps(recipe.eval_resize),
        "student": json.dumps(student),
        "role": json.dumps(_role(recipe, student)),
        "dataset": json.dumps(recipe.dataset),
        "val": json.dumps(recipe.val),
    }


def _role(recipe: Recipe, student: int) -> str:
    """Why this student is the one, in words."""
    S = recipe.students
    if S == 1:
        return "the only student"
    if recipe.has_leader:
        which = "the leader" if student == S - 1 else f"peer {student}"
        return f"{which} of {recipe.method}"
    if student != recipe.kept_student:
        return f"student {student} of {S}, asked for"
    if recipe.reported == "kept":
        return f"student {student} of {S}, drawn by the seed: {recipe.method} has no leader"
    return f"the first of {S}: {recipe.method} has no leader, and its students are alike"


def read_weights(path: Path, *, student: int | None = None, best: bool = False) -> Weights:
    """A student from a run folder, a checkpoint or a ``student.safetensors``.

    Args:
        student: which of a run's or a checkpoint's; None for the one that its recipe keeps.
        best: of a run, the best epoch's in place of the last one's.

    Raises:
        UserError: there is none, or it can't be read.
    """
    if path.is_file():
        if student is not None or best:
            raise UserError(f"{path} is one student, of one epoch: name its run to choose another")
        return _from_file(path)
    if best:
        found = list_checkpoints(path / "checkpoints", "best")
        if not found:
            raise UserError(f"{path} has no best checkpoint: leave --best out")
        return _from_checkpoint(found[0], *load_checkpoint(found[0]), student)
    if (path / STUDENT).is_file() and student is None:
        return _from_file(path / STUDENT)
    if (path / "checkpoints").is_dir():
        newest, tensors, facts, _ = newest_checkpoint(path / "checkpoints")
        return _from_checkpoint(newest, tensors, facts, student)
    if path.is_dir() and (path / "manifest.json").is_file():
        return _from_checkpoint(path, *load_checkpoint(path), student)
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


def _from_checkpoint(
    path: Path, tensors: dict[str, Tensor], facts: dict[str, Any], student: int | None
) -> Weights:
    recipe = Recipe.from_json(facts.get("recipe"))
    if student is None:
        student = recipe.kept_student
    if not 0 <= student < recipe.students:
        raise UserError(
            f"student is {student}: {path} has {recipe.students}, counted from 0, the leader last"
        )
    state = {
        key.removeprefix(prefix): value
        for prefix in ("cohort.trunk.", f"cohort.students.{student}.")
        for key, value in tensors.items()
        if key.startswith(prefix)
    }
    try:
        said = _facts(recipe, facts["class_names"], facts["mean"], facts["std"], student)
    except (KeyError, TypeError) as error:
        raise UserError(f"the checkpoint {path} is no run's: it lacks {error}") from error
    return Weights(path, state, said)
