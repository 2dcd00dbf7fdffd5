"""Classifies picture files with a trained student."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastokd.data.decode import without_warnings
from fastokd.device import set_matmul_precision, use_device
from fastokd.errors import LoaderError, UserError, as_path, warn, wrong_type
from fastokd.host.cpus import share_of_cpus
from fastokd.student.file import read_weights
from fastokd.student.pictures import find_pictures
from fastokd.student.weights import Weights

BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """One picture's most probable classes in descending order; probabilities from 0 to 1."""

    image: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Unread:
    """A picture that can't be read, and why."""

    image: Path
    error: UserError


def predict(
    student: str | os.PathLike[str],
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    top: int = 5,
    batch_size: int = BATCH,
    device: str = "auto",
    skip_damaged: bool = False,
) -> list[Prediction]:
    """The ``top`` most probable classes of each picture, preprocessed as in evaluation.

    The order is that of ``images``, of a folder's pictures by path. The batch size changes the
    probabilities by no more than rounding.

    Args:
        student: a :class:`fastokd.Run`, or the path of a run folder, a checkpoint, a
            ``student.safetensors``, or an export of ``fastokd export`` to safetensors, timm or hub.
        images: files, folders (with their subfolders) and patterns such as ``"pictures/*.jpg"``.
        top: number of classes; limited to the student's.
        batch_size: pictures a forward pass.
        device: ``"auto"`` (a GPU if there is one), ``"cpu"`` or ``"cuda"``.
        skip_damaged: leaves out a picture that can't be read, with a warning, instead of raising.

    Raises:
        UserError: there is no student, or a picture is missing or can't be read.
    """
    given = [images] if isinstance(images, str | os.PathLike) else images
    if not isinstance(given, Sequence):
        raise wrong_type("images", images, "a path, a pattern or a list of them")
    found = []
    for row in predictions(
        student, find_pictures(given), top=top, batch_size=batch_size, device=device
    ):
        if isinstance(row, Prediction):
            found.append(row)
        elif skip_damaged:
            warn(str(row.error))
        else:
            raise row.error
    return found


def predictions(
    student: str | os.PathLike[str],
    files: Sequence[Path],
    *,
    top: int = 5,
    batch_size: int = BATCH,
    device: str = "auto",
) -> Iterator[Prediction | Unread]:
    """:func:`predict` for files, one at a time and in order. A file that can't be read doesn't end it.

    Raises:
        UserError: a wrong option, or there is no student; before the first file is read.
    """
    if top < 1:
        raise UserError(f"top is {top}: it must be at least 1")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: it must be at least 1")
    weights = _weights(as_path("student", student))
    where = use_device(device)
    set_matmul_precision("fp32")
    network = weights.build().to(where)
    return _predictions(weights, network, where, files, top, batch_size)


@torch.no_grad()
def _predictions(
    weights: Weights,
    network: torch.nn.Module,
    device: torch.device,
    files: Sequence[Path],
    top: int,
    batch_size: int,
) -> Iterator[Prediction | Unread]:
    names, shown = weights.fact("class_names"), weights.preprocessing

    def read(path: Path) -> np.ndarray | UserError:
        try:
            return shown.read(path)
        except LoaderError:
            raise
        except UserError as error:
            return error

    with ThreadPoolExecutor(share_of_cpus()) as pool:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            with without_warnings():
                read_B = list(pool.map(read, batch))
            pixels_B = [pixels for pixels in read_B if not isinstance(pixels, UserError)]
            probabilities: Iterator[torch.Tensor] = iter(())
            if pixels_B:
                images_BHWC = torch.from_numpy(np.stack(pixels_B)).to(device)
                logits_BC = network(shown.normalized(images_BHWC))
                probabilities = iter(logits_BC.softmax(1).cpu())
            for path, pixels in zip(batch, read_B, strict=True):
                if isinstance(pixels, UserError):
                    yield Unread(path, pixels)
                    continue
                best = next(probabilities).topk(min(top, len(names)))
                classes = tuple(names[index] for index in best.indices.tolist())
                yield Prediction(path, classes, tuple(best.values.tolist()))


def _weights(path: Path) -> Weights:
    """Reads a student, from an export's folder too."""
    if (path / "student.json").is_file():
        found = sorted(path.glob("*.safetensors"))
        if not found:
            raise UserError(
                f"{path} is an export that fastokd can't read: name the run, or an export to "
                "safetensors, timm or hub"
            )
        path = found[0]
    return read_weights(path)
