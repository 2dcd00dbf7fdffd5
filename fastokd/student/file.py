"""Reads a student's weights from a run folder, a checkpoint or a ``student.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from fastokd.checkpoint import (
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    run_checkpoint,
)
from fastokd.cohort.keys import state_of_student
from fastokd.data.preprocessing import preprocessing_of
from fastokd.errors import UserError, warn, wrong_type
from fastokd.learner.average import prefix_of
from fastokd.learner.state import below
from fastokd.metrics import MetricLines, Row
from fastokd.recipe.recipe import Recipe
from fastokd.student.weights import STUDENT, Weights, from_file, student_facts


def student_of(
    path: Path,
    tensors: dict[str, Tensor],
    facts: dict[str, Any],
    rows: list[Row],
    student: int | None = None,
) -> Weights:
    """One student of a run's checkpoint.

    Args:
        rows: the run's ``metrics.jsonl``; the score is included if this step was measured.
        student: its index. None for the kept student. The weights are its average if the recipe keeps
            one.

    Raises:
        UserError: the index is out of range, or the checkpoint isn't from a run.
    """
    recipe = Recipe.from_json(facts.get("recipe"))
    if student is None:
        student = recipe.kept_student
    if isinstance(student, bool) or not isinstance(student, int):
        raise wrong_type("student", student, "a whole number")
    if not 0 <= student < recipe.students:
        raise UserError(
            f"student is {student}: {path} has {recipe.students}, counted from 0, the leader last"
        )
    averaged = recipe.keeps_average(student)
    if averaged:
        state = below(tensors, prefix_of(student, recipe.kept_student))
    elif (companion := recipe.companion_of(student)) is not None:
        state = state_of_student(tensors, companion, "method.companion.networks.")
    else:
        state = state_of_student(tensors, student, "cohort.")
    try:
        shown = preprocessing_of(
            recipe.dataset,
            mean=facts["mean"],
            std=facts["std"],
            image_size=recipe.image_size,
            eval_resize=recipe.eval_resize,
        )
        said = student_facts(recipe, facts["class_names"], shown, student)
        of_run = {
            "step": facts["step"],
            "ema": (recipe.ema or None) if averaged else None,
            **({"swa": True} if averaged and recipe.swa else {}),
            "score": _measured(rows, facts["step"], recipe, student),
            "recipe": recipe.to_json(),
        }
    except (KeyError, TypeError) as error:
        raise UserError(f"the checkpoint {path} isn't from a run: {error} is missing") from error
    return Weights(path, state, said | {name: json.dumps(of_run[name]) for name in of_run})


def _measured(rows: list[Row], step: int, recipe: Recipe, student: int) -> dict[str, Any] | None:
    """The score at ``step`` of the weights that are kept of a student."""
    for row in reversed(rows):
        found = row.get("test") or row.get("val")
        if row.get("step") == step and found:
            top1 = _top1(found, recipe, student)
            if top1 is not None:
                split = "test" if row.get("test") else "val"
                return {"split": split, "top1": top1, "epoch": row["epoch"] + 1}
    return None


def _top1(metrics: dict[str, Any], recipe: Recipe, student: int) -> float | None:
    companion = recipe.companion_of(student)
    if companion is not None:
        return next(iter(metrics.get("companion_student_top1", [])[companion:]), None)
    if not recipe.keeps_average(student):
        return next(iter(metrics["student_top1"][student:]), None)
    if student == recipe.kept_student:
        return metrics.get("ema_top1")
    return next(iter(metrics.get("ema_student_top1", [])[student:]), None)


def read_weights(path: Path, *, student: int | None = None, best: bool = False) -> Weights:
    """A student from a run folder, a checkpoint or a ``student.safetensors``.

    A run folder gives the weights of its newest step: its ``student.safetensors``, or the newest
    complete checkpoint if its step is later (the run continued and hasn't ended).

    Args:
        student: the index in a run or a checkpoint; None for the kept student. The weights are its
            average if the recipe keeps one.
        best: reads a run's best epoch instead of its last.

    Raises:
        UserError: there are no weights, or they can't be read.
    """
    if path.is_file():
        if student is not None or best:
            raise UserError(
                f"{path} holds one student of one epoch: name its run to choose another"
            )
        return from_file(path)
    if best:
        found = list_checkpoints(path / "checkpoints", "best")
        if not found:
            raise UserError(f"{path} has no best checkpoint: leave --best out")
        return _from_checkpoint(found[0], *load_checkpoint(found[0]), student)
    if (path / STUDENT).is_file():
        written = from_file(path / STUDENT)
        if student in (None, written.facts.get("student") and written.fact("student")):
            return _newer(path, written)
    if (path / "checkpoints").is_dir() or (path / "manifest.json").is_file():
        return _from_checkpoint(*run_checkpoint(path), student)
    raise UserError(f"{path} is no run, checkpoint or {STUDENT}: name one of them")


def _newer(run: Path, written: Weights) -> Weights:
    """``written``, or the same student from a checkpoint of a later step."""
    step = written.fact("step") if "step" in written.facts else -1
    saved = list_checkpoints(run / "checkpoints")
    if not saved or checkpoint_step(saved[0]) <= step:
        return written
    try:
        path, tensors, facts, faults = newest_checkpoint(run / "checkpoints")
    except UserError as error:
        warn(f"{error} ({STUDENT} is used)")
        return written
    if checkpoint_step(path) <= step:
        return written
    if step < 0 and ("recipe" not in facts or (faults and _finished(run, facts))):
        return written  # a file of an earlier version lacks the step; the end of the run wrote it
    if step >= 0:
        warn(f"{written.path} is from step {step}, but the run continued: {path.name} is used")
    return _from_checkpoint(path, tensors, facts, None)


def _finished(run: Path, facts: dict[str, Any]) -> bool:
    """Whether the run's last epoch was measured."""
    rows = run_rows(run)
    return bool(rows) and rows[-1]["epoch"] + 1 == Recipe.from_json(facts.get("recipe")).epochs


def run_rows(run: Path) -> list[Row]:
    """A run's ``metrics.jsonl``; warns and returns no rows if it is damaged."""
    try:
        return MetricLines(run / "metrics.jsonl").read()
    except UserError as error:
        warn(f"{error} (no score is shown)")
        return []


def _from_checkpoint(
    path: Path, tensors: dict[str, Tensor], facts: dict[str, Any], student: int | None
) -> Weights:
    return student_of(path, tensors, facts, run_rows(path.parent.parent), student)
