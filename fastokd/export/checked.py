"""Writes a student, reads it back by its own library, and keeps it only if both say the same."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastokd.checkpoint import sync_folder, write_durably
from fastokd.errors import DiskError, UserError, unknown_name
from fastokd.export.formats import NEEDS, SINGLE_FILES, Format
from fastokd.export.hub import HUB
from fastokd.names import in_utf8
from fastokd.student_file import Weights, read_weights
from fastokd.training.parts import evaluation_stream, load_splits
from fastokd.training.run_folder import RunFolder
from fastokd.training.session import RunOptions

FORMATS: dict[str, Format] = {**SINGLE_FILES, "hub": HUB}
ABOUT = "student.json"
# Of the largest logit: other kernels add in another order.
TOLERANCE = 1e-4
BATCH = 16


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
    1e-4 of the largest; otherwise nothing is left.

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
    images_BCHW, what = _images(source, weights, options or RunOptions())

    network = weights.build()
    with torch.no_grad():
        wanted_BC = network(images_BCHW)
    form = FORMATS[to]
    beside = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    made = [parent for parent in folder.parents if not parent.exists()]
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
            f"its logits on {what}, loaded again: at most {furthest:.1g} away",
            f"read it by {form.how(weights, where)}",
        ),
    )


def _images(source: Path, weights: Weights, options: RunOptions) -> tuple[Tensor, str]:
    """Normalised images ``[B, 3, H, W]`` to compare on, and what they are."""
    run = source if (source / "recipe.json").is_file() else source.parent.parent
    if not (run / "recipe.json").is_file():
        size = weights.fact("input_size")
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(BATCH, 3, size, size, generator=generator)
        return noise, f"{BATCH} images of seeded noise"
    recipe = RunFolder(run).recipe()
    data = load_splits(recipe, options, torch.device("cpu"))
    split, name = (data.test, "test") if data.val is None else (data.val, "validation")
    images_BHWC, _ = next(iter(evaluation_stream(split).batches(0)))
    images_BHWC = images_BHWC[:BATCH]
    mean_3, std_3 = (torch.tensor(weights.fact(key)) for key in ("mean", "std"))
    normal_BHWC = (images_BHWC.float() / 255 - mean_3) / std_3
    images_BCHW = normal_BHWC.permute(0, 3, 1, 2).contiguous()
    return images_BCHW, f"{len(images_BCHW)} {name} images of {recipe.dataset}"


def _compare(got_BC: Tensor, wanted_BC: Tensor, to: str) -> float:
    """How far apart they are, as a share of the largest logit; too far raises."""
    scale = wanted_BC.abs().max().item() or 1.0
    furthest = (got_BC - wanted_BC).abs().max().item() / scale
    if not furthest <= TOLERANCE:
        raise UserError(
            f"the export to {to} gives other logits than the student: {furthest:.2g} of the "
            f"largest apart, and at most {TOLERANCE:g} is allowed; nothing was kept, choose another format"
        )
    return furthest
