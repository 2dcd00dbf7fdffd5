"""The teachers of a run: found, checked against its data, and made one classifier or cached logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastokd.data import DatasetSplits
from fastokd.distributed.ranks import Ranks, speaks
from fastokd.errors import UserError, warn
from fastokd.methods import method_class
from fastokd.recipe.recipe import Recipe
from fastokd.run.facts import run_path
from fastokd.run.options import RunOptions
from fastokd.run.taught import taught
from fastokd.student.teacher import build_teachers, check_held_out, find_teachers, said_held_out
from fastokd.student.weights import Weights


def teachers_of(
    recipe: Recipe, options: RunOptions, data: DatasetSplits, ranks: Ranks
) -> tuple[Weights, ...]:
    """The method's teachers: the copies in a resumed run, or what the options name."""
    if not method_class(recipe.method).needs.teacher:
        return ()
    kept = run_path(recipe, options) if options.resume else None
    teachers: tuple[Weights, ...] = ranks.first(
        lambda: find_teachers(recipe, options.teacher, kept)
    )
    for teacher in teachers:
        if kept is not None and teacher.path.parent == kept:
            continue
        if not check_held_out(teacher, data, "the teacher", recipe) and speaks():
            warn(
                f"the teacher {teacher.path} doesn't say what was held out of its training: it may "
                f"have seen the images of {said_held_out(data)}"
            )
    return teachers


def teacher_of(
    recipe: Recipe,
    options: RunOptions,
    data: DatasetSplits,
    teachers: tuple[Weights, ...],
    device: torch.device,
) -> tuple[nn.Module | None, Tensor | None]:
    """The teacher that runs in every step, or its cached logits."""
    if not teachers:
        return None, None
    with torch.random.fork_rng(devices=[]):
        teacher = build_teachers(teachers, data)
    if recipe.cache_teacher == "no":
        return teacher, None
    if options.overfit_batch:
        raise UserError(
            f"cache_teacher is {recipe.cache_teacher!r}, but --overfit-batch repeats one augmented batch: "
            "leave one of them out"
        )
    folder = run_path(recipe, options) if options.resume else None
    return None, taught(teacher, teachers, data, device, folder)
