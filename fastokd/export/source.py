"""Where an exported student comes from: its run's data, and its place in the run's cohort."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastokd.checkpoint import load_checkpoint
from fastokd.data import DatasetSplits
from fastokd.errors import UserError, warn
from fastokd.learner.build import build_cohort
from fastokd.learner.state import below
from fastokd.recipe.recipe import Recipe
from fastokd.run.folder import RunFolder
from fastokd.run.images import load_splits
from fastokd.run.options import RunOptions
from fastokd.student.file import student_of
from fastokd.student.weights import Weights
from fastokd.student.within_cohort import BATCH, alike, first_images, within_cohort


class Source(NamedTuple):
    """uint8 images ``[B, H, W, 3]`` to compare logits on, and what they are in words; the result of
    comparing the student with its place in the run's cohort; the run's data, with the student's
    preprocessing, and seed. Outside of a run: noise, and no data."""

    images_BHWC: Tensor
    what: str
    through: tuple[str, ...]
    data: DatasetSplits | None
    seed: int


def source_of(path: Path, weights: Weights, options: RunOptions) -> Source:
    """The source of ``weights``, which were read from ``path``.

    Raises:
        UserError: the run's data can't be found, or as :func:`alike`.
    """
    run = path if (path / "recipe.json").is_file() else path.parent.parent
    if not (run / "recipe.json").is_file():
        size = weights.preprocessing.input_size
        generator = torch.Generator().manual_seed(0)
        shape = (BATCH, size, size, 3)
        noise = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        return Source(noise, f"{BATCH} images of seeded noise", (), None, 0)
    where = RunFolder(run)
    recipe, options = where.recipe(), where.facts.with_data(options)
    data = load_splits(recipe, options, begun=True, kept=where.facts.data())
    name = "test" if data.val is None else "validation"
    images_BHWC = first_images(data).cpu()
    what = f"{len(images_BHWC)} {name} images of {recipe.dataset}"
    # The run keeps the mean and deviation that it began with.
    data = replace(data, preprocessing=weights.preprocessing)
    through = _through(run, weights, recipe, data, images_BHWC)
    return Source(images_BHWC, what, through, data, recipe.seed)


def _through(
    run: Path, weights: Weights, recipe: Recipe, data: DatasetSplits, images_BHWC: Tensor
) -> tuple[str, ...]:
    """Compares the student with itself in the cohort, by the engine that trained it.

    Raises:
        UserError: as :func:`alike`.
    """
    saved = weights.path
    if saved.is_file():
        step = weights.fact("step") if "step" in weights.facts else -1
        saved = run / "checkpoints" / f"last-{step:09d}"
        if not saved.is_dir():
            return ("not compared within its cohort: the run has no checkpoint of its step",)
    try:
        tensors, facts = load_checkpoint(saved)
    except UserError as error:
        warn(f"{error} (the student isn't compared within its cohort)")
        return ()
    how = facts.get("how", {})
    cohort, _ = build_cohort(
        recipe,
        len(data.class_names),
        image_size=data.train.image_size[0],
        mean=data.mean,
        std=data.std,
    )
    cohort.load_state_dict(below(tensors, "cohort."))
    cohort.set_engine(how.get("engine", "auto"))
    index = weights.fact("student")
    state = student_of(saved, tensors, facts, [], index).state
    logits_BC = within_cohort(cohort, index, state, images_BHWC)
    furthest = alike(logits_BC, weights, images_BHWC, how.get("precision", "fp32"), run)
    return (f"its logits within its cohort, engine {cohort.engine}: at most {furthest:.1g} away",)
