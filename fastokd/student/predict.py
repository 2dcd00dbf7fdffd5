"""Classifies picture files with a trained student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastokd.errors import UserError
from fastokd.student.file import read_weights
from fastokd.student.weights import Weights


@dataclass(frozen=True)
class Prediction:
    """One picture's most probable classes in descending order; probabilities from 0 to 1."""

    image: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@torch.no_grad()
def predict(student: str | Path, images: Sequence[str | Path], *, top: int = 5) -> list[Prediction]:
    """The ``top`` most probable classes of each picture, preprocessed as in evaluation.

    Args:
        student: a run folder, a checkpoint, a ``student.safetensors``, or an export of
            ``fastokd export`` to safetensors, timm or hub.
        images: files that Pillow reads.
        top: number of classes; limited to the student's.

    Raises:
        UserError: there is no student, or a picture is missing or can't be read.
    """
    if top < 1:
        raise UserError(f"top is {top}: it must be at least 1")
    weights = _weights(Path(student))
    network = weights.build()
    names, shown = weights.fact("class_names"), weights.preprocessing
    predictions = []
    for path in map(Path, images):
        if not path.is_file():
            raise UserError(f"there is no picture {path}: name a file that Pillow reads")
        pixels_BHWC = torch.tensor(shown.read(path))[None]
        logits_BC = network(shown.normalized(pixels_BHWC))
        best = logits_BC.softmax(1)[0].topk(min(top, len(names)))
        predictions.append(
            Prediction(
                path,
                tuple(names[index] for index in best.indices.tolist()),
                tuple(best.values.tolist()),
            )
        )
    return predictions


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
