"""Writes a student, reads it back by its own library, and keeps it only if both say the same."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastokd.checkpoint import load_checkpoint, sync_folder, write_durably
from fastokd.data import DatasetSplits
from fastokd.errors import DiskError, UserError, unknown_name, warn
from fastokd.host.names import in_utf8
from fastokd.learner.state import below
from fastokd.recipe.recipe import Recipe
from fastokd.run.build import build_cohort, load_splits
from fastokd.run.folder import RunFolder
from fastokd.run.options import RunOptions
from fastokd.student.export.formats import NEEDS, SINGLE_FILES, Format
from fastokd.student.export.hub import HUB
from fastokd.student.file import Weights, read_weights, student_of
from fastokd.student.within_cohort import BATCH, alike, first_images, furthest_apart, within_cohort

FORMATS: dict[str, Format] = {**SINGLE_FILES, "hub": HUB}
ABOUT = "student.json"
# Of the largest logit: other kernels add in another order.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Export:
    """What was written: a folder with the student's file and ``student.json``."""

    folder: Path
    lines: tuple[str, ...]


def export(
    source: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    student: int | None = None,
    best: bool = False,
    options: RunOptions | None = None,
) -> Export:
    """Turns a student into a folder for another library.

    The file is loaded by that library and has to give the student's logits on a batch of the run's
    held-out images (on seeded noise where ``source`` is a lone file, which has no data), within
    1e-4 of the largest; and the student those of its place in the run's cohort, by the engine that
    trained it (``fastokd/student/within_cohort.py``). Otherwise nothing is left.

    Args:
        source: a run folder, a checkpoint of one, or a ``student.safetensors``.
        to: a format, see :data:`FORMATS`; ``"hub"`` is the layout of a model hub, with a card
            (nothing is uploaded).
        out: the folder to write; ``SOURCE/export/FORMAT`` by default.
        student: which of a run's students, counted from 0; the one that the recipe keeps.
        best: of a run, the best epoch's in place of the last one's.
        options: where the run's data lie.

    Raises:
        UserError: an unknown format, a network that the library doesn't have, a package that is
            missing, an ``out`` that exists, data that can't be found, logits that differ.
    """
    if to not in FORMATS:
        raise unknown_name("format", to, FORMATS)
    missing = [name for name in NEEDS.get(to, ()) if importlib.util.find_spec(name) is None]
    if missing:
        extra = "onnx" if to == "onnx" else to
        raise UserError(
            f"an export to {to} needs {' and '.join(missing)}: pip install 'fastokd[{extra}]'"
        )
    source = Path(source)
    weights = read_weights(source, student=student, best=best)
    base = source if source.is_dir() else source.parent
    folder = Path(out) if out is not None else base / "export" / to
    if folder.exists():
        raise UserError(f"{folder} exists already and is never overwritten: choose another --out")
    images_BCHW, what, through = _images(source, weights, options or RunOptions())

    network = weights.build()
    with torch.no_grad():
        wanted_BC = network(images_BCHW)
    form = FORMATS[to]
    beside = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    made = [parent for parent in folder.parents if not parent.exists()]
    # An export that was killed may have had this process's number, as containers count from 1.
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        with in_utf8(beside) as place:
            name = form.write(weights, network, place)
            with torch.no_grad():
                got_BC = form.read(weights, place / name)(images_BCHW)
        furthest = _compare(got_BC, wanted_BC, to)
        about = {"file": name, **weights.about()}
        write_durably(beside / ABOUT, (json.dumps(about, indent=1) + "\n").encode())
        os.rename(beside, folder)
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{folder} can't be written: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):  # where the export is in them they stay
            for parent in made:
                parent.rmdir()
    sync_folder(folder.parent)
    where = str(folder / name)
    return Export(
        folder,
        (
            f"{weights.model}, {weights.fact('role')}, from {weights.path}",
            *through,
            f"its logits on {what}, loaded again: at most {furthest:.1g} away",
            f"read it by {form.how(weights, where)}",
        ),
    )


def _images(
    source: Path, weights: Weights, options: RunOptions
) -> tuple[Tensor, str, tuple[str, ...]]:
    """Normalised images ``[B, 3, H, W]`` to compare on, what they are, and what comparing the
    student with itself in its run's cohort gave."""
    run = source if (source / "recipe.json").is_file() else source.parent.parent
    if not (run / "recipe.json").is_file():
        size = weights.preprocessing.input_size
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(BATCH, 3, size, size, generator=generator)
        return noise, f"{BATCH} images of seeded noise", ()
    recipe = RunFolder(run).recipe()
    data = load_splits(recipe, options, torch.device("cpu"))
    name = "test" if data.val is None else "validation"
    images_BHWC = first_images(data)
    images_BCHW = weights.preprocessing.normalized(images_BHWC)
    what = f"{len(images_BCHW)} {name} images of {recipe.dataset}"
    return images_BCHW, what, _through(run, weights, recipe, data, images_BHWC)


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
    # The run keeps the mean and deviation that it began with.
    shown = replace(data, preprocessing=weights.preprocessing)
    cohort, _ = build_cohort(recipe, shown, RunOptions())
    cohort.load_state_dict(below(tensors, "cohort."))
    cohort.set_engine(how.get("engine", "auto"))
    index = weights.fact("student")
    state = student_of(saved, tensors, facts, [], index).state
    logits_BC = within_cohort(cohort, index, state, images_BHWC)
    furthest = alike(logits_BC, weights, images_BHWC, how.get("precision", "fp32"), run)
    return (f"its logits within its cohort, engine {cohort.engine}: at most {furthest:.1g} away",)


def _compare(got_BC: Tensor, wanted_BC: Tensor, to: str) -> float:
    """How far apart they are, as a share of the largest logit; too far raises."""
    furthest = furthest_apart(got_BC, wanted_BC)
    if not furthest <= TOLERANCE:
        raise UserError(
            f"the export to {to} gives other logits than the student: {furthest:.2g} of the "
            f"largest apart, and at most {TOLERANCE:g} is allowed; nothing was kept, choose another format"
        )
    return furthest
