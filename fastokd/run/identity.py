"""Which run a folder holds, and how many of its epochs and steps are done.

A run is identified by its recipe and the options that determine its numbers (:data:`KEPT`), including
the contents of ``init`` and of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from fastokd.checkpoint import fingerprint
from fastokd.device import pick_device, pick_precision
from fastokd.distributed.launch import launched
from fastokd.errors import UserError
from fastokd.methods import method_class, ramp_weight
from fastokd.metrics import MetricLines
from fastokd.recipe.names import Recipe
from fastokd.recipe.resolution import training_size
from fastokd.run.facts import RunFacts
from fastokd.run.options import LEFT_OPEN, RunOptions
from fastokd.run.standing import Standing as Standing
from fastokd.run.standing import standing
from fastokd.student.init import read_files
from fastokd.student.teacher import default_path, kept_teachers
from fastokd.student.teacher_file import file_of, names_of, read_teacher
from fastokd.student.weights import STUDENT, Weights

# The options that change a run's numbers by more than their last bits. The papers set none of them.
DECIDING = ("accumulate", "clip_norm", "overfit_batch", "sync_bn", "init", "eval_every")

# The settings of a recipe that more epochs may change.
SCHEDULE = (
    *("epochs", "milestones", "ramp_epochs", "warmup_epochs", "mix_epochs", "size_epochs"),
    *("frozen_epochs", "average_start"),
)


def is_done(folder: Path, wanted: Recipe, max_steps: int | None) -> bool:
    """Whether the run in ``folder`` has all epochs of its recipe, or ``max_steps`` steps.

    Raises:
        UserError: it has more steps than ``max_steps``.
    """
    at = standing(folder, MetricLines(folder / "metrics.jsonl").read())
    if max_steps is not None and at.step > max_steps:
        raise UserError(
            f"max_steps is {max_steps}, but the run in {folder} has taken {at.step}: ask for at least "
            "as many, or choose another --out"
        )
    ended = at.epochs >= wanted.epochs or at.step == max_steps
    return ended and (folder / STUDENT).is_file()


def refuse_another(folder: Path, wanted: Recipe, options: RunOptions) -> None:
    """Raises UserError with the differences if the folder's run has another recipe or other options.

    An option that is ``"auto"`` matches any value, except ``precision``, which is resolved on this
    machine.
    """
    differing = other_recipe(wanted, RunFacts(folder).recipe().to_json())
    precision = pick_precision(options.precision, pick_device(options.device))
    asked = replace(options, precision=precision)
    differing += asked.differing(begun_with(folder, asked), LEFT_OPEN)
    if method_class(wanted.method).needs.teacher:
        default = default_path(wanted)
        given = options.teacher or ((str(default),) if default.exists() else ())
        differing += other_teacher(folder, given)
    if differing:
        raise UserError(
            f"{folder} holds another run: it differs in {', '.join(differing)}; choose another --out"
        )


def other_recipe(recipe: Recipe, theirs: Mapping[str, Any]) -> list[str]:
    """Each setting in which ``theirs`` differs from ``recipe``, with both values. A recipe of an earlier
    version lacks settings, which were then what is now their default."""
    ours, theirs = recipe.to_json(), {**_defaults(), **theirs}
    return [
        f"{k} ({theirs.get(k)} there, {ours[k]} here)" for k in ours if theirs.get(k) != ours[k]
    ]


def _defaults() -> dict[str, Any]:
    """The default of each setting that has one, as a JSON value."""
    found = {field.name: field.default for field in fields(Recipe) if field.default is not MISSING}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}


def check_recipe(recipe: Recipe, theirs: Mapping[str, Any]) -> None:
    """Raises UserError with the differences if a checkpoint's recipe ``theirs`` isn't ``recipe``."""
    differing = other_recipe(recipe, theirs)
    if differing:
        raise UserError(
            f"the checkpoint has another recipe: it differs in {', '.join(differing)}; "
            "resume with the run's own recipe (`fastokd train --resume DIR`, where --epochs may be "
            "larger), or choose another --out"
        )


def continues(recipe: Recipe, checkpoint: Mapping[str, Any]) -> bool:
    """Whether ``recipe`` is that of a checkpoint with more epochs, and the epochs that were begun would
    have been the same under it. ``checkpoint``: its facts."""
    try:
        begun = Recipe.from_json(checkpoint["recipe"])
        count = int(checkpoint.get("epoch", 0)) + (int(checkpoint.get("batch", 0)) > 0)
    except (UserError, KeyError, TypeError, ValueError):
        return False  # raised again where the checkpoint is loaded
    longer = replace(begun, **{name: getattr(recipe, name) for name in SCHEDULE})
    return (
        recipe.epochs > begun.epochs
        and recipe == longer
        and all(_schedule(recipe, epoch) == _schedule(begun, epoch) for epoch in range(count))
    )


def _schedule(recipe: Recipe, epoch: int) -> tuple[float, ...]:
    """All that an epoch's steps take from its place in the schedule."""
    # By step, two places of an epoch tell schedules of different lengths apart.
    places = ((warm_up, step) for warm_up in (True, False) for step in (0, 1))
    rates = (recipe.learning_rate(epoch, warm_up=w, step=step, steps=2) for w, step in places)
    mixes = recipe.mix_epochs == 0 or epoch < recipe.mix_epochs
    ramp = ramp_weight(epoch + recipe.ramp_first, recipe.ramp_epochs)
    averages = epoch >= recipe.average_start
    at = recipe.frozen_at(epoch), training_size(recipe, epoch)
    return (*rates, ramp, mixes, averages, *at)


def begun_with(folder: Path, options: RunOptions) -> dict[str, Any]:
    """The environment that the run was begun with. ``init`` is that of ``options`` if its contents are
    the same; ``capture`` and ``streams`` are open again where more ranks resume what one captured."""
    begun = RunFacts(folder).environment()
    if begun.get("capture") and not stays_captured(begun):
        begun |= {"capture": None, "streams": None}
    if begun.get("optimizer") == "apex-sgd":  # as earlier versions called it
        begun["apex"] = True
    contents = begun.get("init_sha256")
    if contents and options.init and all(Path(name).exists() for name in options.init):
        named = tuple(begun.get("init", ()))
        if [fingerprint(weights.state) for weights, _ in read_files(options.init)] == contents:
            begun["init"] = options.init
        elif named == options.init:
            begun["init"] = tuple(f"{name}, as it was," for name in named)
    return begun


def stays_captured(begun: Mapping[str, Any]) -> bool:
    """Whether a resumed run captures its steps as it was begun. One rank captures unasked; several
    don't."""
    return bool(begun.get("capture")) and (launched() == 1 or begun.get("ranks", launched()) > 1)


def other_teacher(folder: Path, given: Sequence[str]) -> list[str]:
    """The difference between the teachers ``given`` and those kept in ``folder``, or nothing."""
    kept, names = kept_teachers(folder), names_of(given)
    if not kept or not names:
        return []
    same = len(kept) == len(names) and all(map(_is_kept, names, kept))
    there = "+".join(source_of(weights) for weights in kept)
    said = f"--teacher ({there} as it was there, {'+'.join(names)} as it is here)"
    return [] if same else [said]


def _is_kept(name: str, kept: Weights) -> bool:
    """Whether ``name`` names the weights of ``kept``, or their source if that is gone."""
    path = file_of(name)
    if path is not None and path.exists():
        return fingerprint(read_teacher(name).state) == fingerprint(kept.state)
    source = source_of(kept)
    return name == source or Path(name) in (Path(source), *Path(source).parents)


def source_of(kept: Weights) -> str:
    source: str = kept.facts.get("taken_from", "")
    # Files of earlier versions have the path as it is.
    return kept.fact("taken_from") if source.startswith('"') else source


def deciding(folder: Path) -> dict[str, Any]:
    """The options of the run in ``folder`` that change its numbers and aren't the default."""
    begun, usual = RunFacts(folder).environment(), RunOptions()
    return {
        name: begun[name]
        for name in DECIDING
        if name in begun and begun[name] not in ([], getattr(usual, name))
    }
