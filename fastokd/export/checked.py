"""Writes a student, reads it with the format's library, and keeps the file if the logits are equal."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError

from fastokd.checkpoint import sync_folder, write_durably
from fastokd.device import pick_device
from fastokd.errors import DiskError, UserError, as_path, unknown_name
from fastokd.export import card, int8
from fastokd.export.classify import NAME, program
from fastokd.export.contract import about_export, input_sentence
from fastokd.export.formats import PLAIN, Format
from fastokd.export.hub import HUB, front_matter
from fastokd.export.measured import Job, measured, sentences
from fastokd.export.source import source_of
from fastokd.export.traced import OF_PIXELS, TRACED
from fastokd.host.names import in_utf8
from fastokd.run.options import RunOptions
from fastokd.student.file import read_weights
from fastokd.student.within_cohort import furthest_apart

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
    measure: bool = False,
    calibrate: Sequence[str | os.PathLike[str]] = (),
    calibration_images: int | None = None,
    options: RunOptions | None = None,
) -> Export:
    """Exports a student into a folder for another library.

    That library loads the file, and its logits on a batch of the run's held-out images must equal the
    student's within 1e-4 of the largest (on seeded noise if ``source`` is a file outside of a run).
    The student's logits must also equal those of its place in the run's cohort, by the engine that
    trained it (``fastokd/student/within_cohort.py``). Otherwise nothing is written. For ``onnx-int8``
    this is checked before the network is quantised; then its accuracy on the run's test set is
    measured.

    Args:
        source: a :class:`fastokd.Run`, or the path of a run folder, of a checkpoint of one, or of a
            ``student.safetensors``.
        to: a format, see :data:`FORMATS`; ``"hub"`` is the layout of a model hub (nothing is uploaded).
        out: the folder to write; by default ``SOURCE/export/FORMAT``, of uint8 inputs
            ``SOURCE/export/FORMAT-uint8``.
        student: which of a run's students, counted from 0; by default the one that the recipe keeps.
        best: of a run, the best epoch's weights in place of the last epoch's.
        uint8: the exported network takes uint8 images ``[B, H, W, 3]`` and normalises them; of onnx,
            onnx-int8 and torch-export.
        measure: measure the accuracy by class and the latency, for the card.
        calibrate: pictures, folders or patterns that calibrate onnx-int8, in place of training images.
        calibration_images: how many images calibrate onnx-int8; by default 256.
        options: say where the run's data are, and whether a GPU's latency is measured (``device``).

    Raises:
        UserError: an unknown format, a network that the library doesn't have, a missing package, an
            ``out`` that exists, missing data, logits that differ.
    """
    form = _format(to, uint8)
    if not form.int8 and (calibrate or calibration_images is not None):
        raise UserError(f"an export to {to} isn't calibrated: choose onnx-int8, or leave it out")
    path, options = as_path("source", source), options or RunOptions()
    device = pick_device(options.device) if measure else None
    weights = read_weights(path, student=student, best=best)
    base = path if path.is_dir() else path.parent
    folder = Path(out) if out is not None else base / "export" / (f"{to}-uint8" if uint8 else to)
    if folder.exists():
        raise UserError(f"{folder} exists already and is never overwritten: choose another --out")
    seen = source_of(path, weights, options)
    shown = weights.preprocessing
    images = int8.calibration(seen, shown, calibrate, calibration_images) if form.int8 else None

    name = form.file.format(model=weights.model.replace(":", "-").replace("/", "-"))
    about = about_export(weights, to, name, form.pixels)
    code = program(shown, name, form.how(weights), about=about, run=form.run)
    with _new_folder(folder) as place, TemporaryDirectory() as work:
        job = Job(form, weights, about, place / name, Path(work) / "float32.onnx", seen)
        # A network that was traced may not run any more: each use builds its own.
        form.write(weights, weights.build(), job.file, about)
        furthest = _furthest(job)
        if images is not None:
            shutil.move(job.file, job.float32)
            int8.quantise(job.float32, job.file, job.inputs(images.images_NHWC), about)
        facts = card.facts(weights, about, job.file.stat().st_size)
        facts |= {"calibration": images and images.facts()}
        facts |= measured(job, facts, device)
        text = (front_matter(weights) if to == "hub" else "") + card.markdown(weights, facts, code)
        write_durably(place / NAME, code.encode())
        write_durably(place / ABOUT, _json(about))
        write_durably(place / card.JSON, _json(facts))
        write_durably(place / card.MARKDOWN, text.encode())
    lines = (
        f"{weights.model}, {weights.fact('role')}, from {weights.path}",
        *seen.through,
        f"its logits on {seen.what}, loaded again: at most {furthest:.1g} away",
        *sentences(facts),
        f"its input: {input_sentence(about)}",
        f"its class names and preprocessing are in {folder / ABOUT}{', and in the file' if to in TRACED else ''}",
        f"its card is {folder / card.MARKDOWN}, as JSON {folder / card.JSON}",
        f"classify a picture with it: {shlex.join(['python', str(folder / NAME), 'picture.jpg'])}",
    )
    return Export(folder, lines)


def _format(to: str, uint8: bool) -> Format:
    if to not in FORMATS:
        raise unknown_name("format", to, FORMATS)
    if uint8 and to not in OF_PIXELS:
        raise UserError(
            f"an export to {to} holds weights without a graph, so that it can't take uint8 images: "
            "choose onnx, onnx-int8 or torch-export, or leave --uint8 out"
        )
    form = OF_PIXELS[to] if uint8 else FORMATS[to]
    missing = [name for name in form.needs if importlib.util.find_spec(name) is None]
    if missing:
        extra = "onnx" if to in TRACED else to
        raise UserError(
            f"an export to {to} needs {' and '.join(missing)}: pip install 'fastokd[{extra}]'"
        )
    return form


def _furthest(job: Job) -> float:
    """The largest difference of the written file's logits from the student's, as a share of the
    largest; raises UserError if it is too large."""
    images_BHWC = job.source.images_BHWC
    with torch.no_grad():
        wanted_BC = job.weights.build()(job.weights.preprocessing.normalized(images_BHWC))
        got_BC = job.form.read(job.weights, job.file)(job.inputs(images_BHWC))
    furthest = furthest_apart(got_BC, wanted_BC)
    if not furthest <= TOLERANCE:
        raise UserError(
            f"the export to {job.about['format']} gives other logits than the student: {furthest:.2g} of "
            f"the largest apart, and at most {TOLERANCE:g} is allowed; nothing was kept, choose another "
            "format"
        )
    return furthest


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``folder`` if nothing is raised and is removed otherwise."""
    beside = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    made = [parent for parent in folder.parents if not parent.exists()]
    # A killed export may have had the same process id: containers count from 1.
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        with in_utf8(beside) as place:
            yield place
        os.rename(beside, folder)
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{folder} can't be written: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):  # the folders stay if the export is in them
            for parent in made:
                parent.rmdir()
    sync_folder(folder.parent)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
