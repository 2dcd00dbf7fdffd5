"""The differences of a run from the recipe of its name or of a cell of the papers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fastokd.errors import UserError
from fastokd.methods import is_loaded, option_defaults
from fastokd.recipe.cells import Cell
from fastokd.recipe.names import TEMPERATURE, Recipe, recipe
from fastokd.run.folder import Run
from fastokd.run.identity import deciding
from fastokd.student.teacher import kept_teachers

# Runs that differ in these fields have another task and aren't compared.
TASK = ("method", "model", "dataset", "sharing")
# Fields that depend on the method.
OF_A_METHOD = ("method", "reported", "teacher")
# Fields that scale with the epochs.
SCHEDULE = ("milestones", "ramp_epochs", "warmup_epochs", "mix_epochs")
Changes = dict[str, tuple[Any, Any]]


def altered(cell: Cell, judged: Recipe, runs: Sequence[Run]) -> list[str] | None:
    """The differences of ``runs``, with the recipe ``judged``, from a cell: ``"lr=0.05 (0.1)"``.

    They include every field of the recipe except name and seed, every option of method and student,
    the run's options that change its numbers, the teacher's model, and epochs that weren't trained.
    None if the cell has another task.
    """
    published = recipe(cell.recipe)
    changes = differences(judged, published)
    if any(name in changes for name in TASK):
        return None
    for run in runs:
        changes |= options_of(run)
    found = [f"{name}={_word(ours)} ({_word(theirs)})" for name, (ours, theirs) in changes.items()]
    return found + [_cut(run) for run in runs if not run.is_whole][:1]


def differences(ours: Recipe, theirs: Recipe) -> Changes:
    """The fields and options in which two recipes differ, with both values; not name and seed."""
    scaled = theirs if ours.epochs == theirs.epochs else theirs.with_epochs(ours.epochs)
    changes: Changes = {}
    for field in dataclasses.fields(Recipe):
        name = field.name
        a, b = getattr(ours, name), getattr(theirs, name)
        if name in ("name", "seed", "method_options"):
            continue
        if name == "model_options":
            changes |= _changed(a, b)
        elif a != b and not (name in SCHEDULE and a == getattr(scaled, name)):
            changes[name] = (a, b)
    if ours.method != theirs.method:
        return changes
    options = [{**option_defaults(r.method), **r.method_options} for r in (ours, theirs)]
    return changes | _changed(*options)


def from_its_name(of: Recipe) -> Changes:
    """The differences of a recipe from the one that its name stands for."""
    try:
        if is_loaded(of.method):
            return differences(of, recipe(of.name))
        # The code of a user's method isn't loaded: the settings of another one, with a ramp as well.
        changes = differences(of, recipe(f"okddip-{of.sharing}/{of.model}/{of.dataset}"))
        options = _changed(of.method_options, {"temperature": TEMPERATURE})
    except UserError:  # an unknown method or data set
        return {}
    return {name: changes[name] for name in changes if name not in OF_A_METHOD} | options


def options_of(run: Run) -> Changes:
    """The run's options that change its numbers, and the teachers' models if they aren't the recipe's."""
    changes: Changes = {name: (value, None) for name, value in deciding(run.folder).items()}
    teachers = kept_teachers(run.folder) if run.recipe.teacher else ()
    if teachers:
        model = "+".join(teacher.model for teacher in teachers)
        wanted = run.recipe.teacher.split("/")[1]
        if model != wanted:
            changes["teacher's model"] = (model, wanted)
    return changes


def shown(changes: Changes) -> list[str]:
    """``["lr=0.05"]``."""
    return [f"{name}={_word(ours)}" for name, (ours, _) in changes.items()]


def _changed(ours: dict[str, Any], theirs: dict[str, Any]) -> Changes:
    pairs = {name: (ours.get(name), theirs.get(name)) for name in {**ours, **theirs}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _cut(run: Run) -> str:
    at = run.standing
    return f"{at.epochs} of {run.recipe.epochs} epochs trained, {at.step} steps"


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
