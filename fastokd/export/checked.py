"""Writes a student, reads it with the format's library, and keeps the file if the logits are equal."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastokd.checkpoint import load_checkpoint, sync_folder, write_durably
from fastokd.data import DatasetSplits
from fastokd.errors import DiskError, UserError, as_path, unknown_name, warn
from fastokd.export.classify import NAME, program
from fastokd.export.contract import about_export, input_sentence
from fastokd.export.formats import PLAIN, Format
from fastokd.export.hub import HUB
from fastokd.export.traced import OF_PIXELS, TRACED
from fastokd.host.names import in_utf8
from fastokd.learner.build import build_cohort
from fastokd.learner.state import below
from fastokd.recipe.recipe import Recipe
from fastokd.run.folder import RunFolder
from fastokd.run.images import load_splits
from fastokd.run.options import RunOptions
from fastokd.student.file import read_weights, student_of
from fastokd.student.weights import Weights
from fastokd.student.within_cohort import BATCH, alike, first_images, furthest_apart, within_cohort

FORMATS: dict[str, Format] = {**PLAIN, **TRACED, "hub": HUB}
ABOUT = "student.json"
# Relative to the largest logit: other kernels sum in another order.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Export:
    """The written folder, with the student's file and ``student.json``; and the lines to print."""

    folder: Path
    lines: tuple[str, ...]


def export(
    source: str | os.PathLike[str],
    to: str,
    out: str | Path | None = None,
    *,
    student: int | None = None,
    best: bool = False,
    uint8: bool = False,
    options: RunOptions | None = None,
) -> Export:
    """Exports a student into a folder for another library.

    That library loads the file, and its logits on a batch of the run's held-out images must equal the
    student's within 1e-4 of the largest (on seeded noise if ``source`` is a file outside of a run).
    The student's logits must also equal those of its place in the run's cohort, by the engine that
    trained it (``fastokd/student/within_cohort.py``). Otherwise nothing is written.

    Args:
        source: a :class:`fastokd.Run`, or the path of a run folder, of a checkpoint of one, or of a
            ``student.safetensors``.
        to: a format, see :data:`FORMATS`; ``"hub"`` is the layout of a model hub, with a card
            (nothing is uploaded).
        out: the folder to write; by default ``SOURCE/export/FORMAT``, of uint8 inputs
            ``SOURCE/export/FORMAT-uint8``.
        student: which of a run's students, counted from 0; by default the one that the recipe keeps.
        best: of a run, the best epoch's weights in place of the last epoch's.
        uint8: the exported network takes uint8 images ``[B, H, W, 3]`` and normalises them; of onnx
            and torch-export.
        options: say where the run's data are.

    Raises:
        UserError: an unknown format, a network that the library doesn't have, a missing package, an
            ``out`` that exists, missing data, logits that differ.
    """
    if to not in FORMATS:
        raise unknown_name("format", to, FORMATS)
    if uint8 and to not in OF_PIXELS:
        raise UserError(
            f"an export to {to} holds weights without a graph, so that it can't take uint8 images: "
            f"choose {' or '.join(OF_PIXELS)}, or leave --uint8 out"
        )
    form = OF_PIXELS[to] if uint8 else FORMATS[to]
    missing = [name for name in form.needs if importlib.util.find_spec(name) is None]
    if missing:
        extra = "onnx" if to == "onnx" else to
        raise UserError(
            f"an export to {to} needs {' and '.join(missing)}: pip install 'fastokd[{extra}]'"
        )
    source = as_path("source", source)
    weights = read_weights(source, student=student, best=best)
    base = source if source.is_dir() else source.parent
    folder = Path(out) if out is not None else base / "export" / (f"{to}-uint8" if uint8 else to)
    if folder.exists():
        raise UserError(f"{folder} exists already and is never overwritten: choose another --out")
    images_BHWC, what, through = _images(source, weights, options or RunOptions())

    network = weights.build()
    images_BCHW = weights.preprocessing.normalized(images_BHWC)
    with torch.no_grad():
        wanted_BC = network(images_BCHW)
    name = form.file.format(model=weights.model.replace(":", "-").replace("/", "-"))
    about = about_export(weights, to, name, form.pixels)
    code = program(weights.preprocessing, name, form.how(weights), about=about, run=form.run)
    beside = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    made = [parent for parent in folder.parents if not parent.exists()]
    # A killed export may have had the same process id: containers count from 1.
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        with in_utf8(beside) as place:
            form.write(weights, network, place / name, about)
            with torch.no_grad():
                got_BC = form.read(weights, place / name)(
                    images_BHWC if form.pixels else images_BCHW
                )
        furthest = furthest_apart(got_BC, wanted_BC)
        if not furthest <= TOLERANCE:
            raise UserError(
                f"the export to {to} gives other logits than the student: {furthest:.2g} of the "
                f"largest apart, and at most {TOLERANCE:g} is allowed; nothing was kept, choose another format"
            )
        write_durably(beside / NAME, code.encode())
        write_durably(beside / ABOUT, (json.dumps(about, indent=1) + "\n").encode())
        os.rename(beside, folder)
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{folder} can't be written: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):  # the folders stay if the export is in them
            for parent in made:
                parent.rmdir()
    sync_folder(folder.parent)
    lines = (
        f"{weights.model}, {weights.fact('role')}, from {weights.path}",
        *through,
        f"its logits on {what}, loaded again: at most {furthest:.1g} away",
        f"its input: {input_sentence(about)}",
        f"its class names and preprocessing are in {folder / ABOUT}{', and in the file' if to in TRACED else ''}",
        f"classify a picture with it: {shlex.join(['python', str(folder / NAME), 'picture.jpg'])}",
    )
    return Export(folder, lines)


def _images(
    source: Path, weights: Weights, options: RunOptions
) -> tuple[Tensor, str, tuple[str, ...]]:
    """uint8 images ``[B, H, W, 3]`` to compare on, their description, and the result of comparing the
    student with its place in the run's cohort."""
    run = source if (source / "recipe.json").is_file() else source.parent.parent
    if not (run / "recipe.json").is_file():
        size = weights.preprocessing.input_size
        generator = torch.Generator().manual_seed(0)
        shape = (BATCH, size, size, 3)
        noise = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        return noise, f"{BATCH} images of seeded noise", ()
    where = RunFolder(run)
    recipe, options = where.recipe(), where.facts.with_data(options)
    data = load_splits(recipe, options, begun=True, kept=where.facts.data())
    name = "test" if data.val is None else "validation"
    images_BHWC = first_images(data)
    what = f"{len(images_BHWC)} {name} images of {recipe.dataset}"
    return images_BHWC, what, _through(run, weights, recipe, data, images_BHWC)


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
    cohort, _ = build_cohort(
        recipe,
        len(shown.class_names),
        image_size=shown.train.image_size[0],
        mean=shown.mean,
        std=shown.std,
    )
    cohort.load_state_dict(below(tensors, "cohort."))
    cohort.set_engine(how.get("engine", "auto"))
    index = weights.fact("student")
    state = student_of(saved, tensors, facts, [], index).state
    logits_BC = within_cohort(cohort, index, state, images_BHWC)
    furthest = alike(logits_BC, weights, images_BHWC, how.get("precision", "fp32"), run)
    return (f"its logits within its cohort, engine {cohort.engine}: at most {furthest:.1g} away",)
