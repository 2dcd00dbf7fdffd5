"""What a student says of someone's own pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastokd.data.folder import decode_image
from fastokd.errors import UserError
from fastokd.student_file import Weights, read_weights


@dataclass(frozen=True)
class Prediction:
    """One picture's most probable classes, the first one first; probabilities from 0 to 1."""

    image: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@torch.no_grad()
def predict(student: str | Path, images: Sequence[str | Path], *, top: int = 5) -> list[Prediction]:
    """The ``top`` classes of each picture.

    Of a picture the centre square is resized to the student's input size, as its held-out images
    were; where the student was evaluated on a centre crop of a larger picture, that is cropped.

    Args:
        student: a run folder, a checkpoint, an export of ``fastokd export`` to safetensors, timm
            or hub, or a ``student.safetensors``.
        images: files that Pillow reads.
        top: how many classes; at most all.

    Raises:
        UserError: no student there, a picture that is missing or can't be read.
    """
    if top < 1:
        raise UserError(f"top is {top}: it must be at least 1")
    weights = _weights(Path(student))
    network = weights.build()
    names, size, resize = (weights.fact(n) for n in ("class_names", "input_size", "eval_resize"))
    mean_3, std_3 = (torch.tensor(weights.fact(key)) for key in ("mean", "std"))
    predictions = []
    for path in map(Path, images):
        if not path.is_file():
            raise UserError(f"there is no picture {path}: name a file that Pillow reads")
        pixels_HWC = _centre(path, size, resize)
        normal_HWC = (torch.tensor(pixels_HWC).float() / 255 - mean_3) / std_3
        logits_BC = network(normal_HWC.permute(2, 0, 1)[None].contiguous())
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
    """Of an export's folder, its one file."""
    if (path / "student.json").is_file():
        found = sorted(path.glob("*.safetensors"))
        if not found:
            raise UserError(
                f"{path} is no export that fastokd reads back: name the run, or an export to "
                "safetensors, timm or hub"
            )
        path = found[0]
    return read_weights(path)


def _centre(path: Path, size: int, resize: int) -> np.ndarray:
    """RGB ``[size, size, 3]``: the centre of the picture whose shorter side is ``resize``."""
    if resize <= size:
        return decode_image(path, size)
    # The centre square at that size holds the crop: nothing outside it is seen.
    whole = Image.fromarray(decode_image(path, resize))
    edge = (resize - size) // 2
    return np.array(whole.crop((edge, edge, edge + size, edge + size)))
