"""The teacher's logits of the training set, computed once (the recipe's ``cache_teacher``).

A run keeps them in its folder, so that a resumed run has the same bits; the file holds the hash of the
teachers' weights, of the images, and of their preprocessing and class names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastokd.checkpoint import fingerprint, write_durably
from fastokd.data import DatasetSplits, Split
from fastokd.errors import UserError
from fastokd.student.weights import Weights

FILE = "teacher_logits.safetensors"
BATCH = 256


def taught(
    teacher: nn.Module,
    weights: Sequence[Weights],
    data: DatasetSplits,
    device: torch.device,
    folder: Path | None,
) -> Tensor:
    """The teacher's logits of every training image without augmentation: float32 ``[N, C]`` on
    ``device``.

    Args:
        teacher: a classifier of the data's normalised images; it is moved to ``device``.
        folder: a resumed run's; its file is read if it is of this data and this teacher.

    Raises:
        UserError: the images aren't held in memory.
    """
    split = data.train
    if not isinstance(split, Split):
        raise UserError(
            f"the teacher's logits of {data.name} can't be cached, since its images are streamed from "
            "disk: set cache_teacher to no"
        )
    key = key_of(weights, data)
    if folder is not None:
        found = _read(folder / FILE, key)
        if found is not None:
            return found.to(device)
    teacher.to(device).eval()
    with torch.no_grad():
        logits = [
            teacher(data.preprocessing.normalized(images_BHWC.to(device))).float()
            for images_BHWC in split.images_NHWC.split(BATCH)
        ]
    return torch.cat(logits)


def write_taught(
    folder: Path, logits_NC: Tensor, weights: Sequence[Weights], data: DatasetSplits
) -> None:
    """Writes the logits into a run's folder."""
    content = save({"logits": logits_NC.cpu()}, {"of": key_of(weights, data)})
    write_durably(folder / FILE, content)


def key_of(weights: Sequence[Weights], data: DatasetSplits) -> str:
    """The hashes of the teachers' weights, of the images in memory, and of what the images and the logits
    mean: preprocessing and class names in order."""
    assert isinstance(data.train, Split)
    images = fingerprint({"images": data.train.images_NHWC.cpu()})
    meaning = json.dumps([data.preprocessing.to_facts(), data.class_names])
    teachers = [fingerprint(one.state) for one in weights]
    return "+".join([*teachers, images, hashlib.sha256(meaning.encode()).hexdigest()])


def _read(path: Path, key: str) -> Tensor | None:
    """The logits in a file of this key; None if there is none."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            if file.metadata() != {"of": key}:
                return None
            mapped: Tensor = file.get_tensor("logits")
            return mapped.clone()  # the file may be replaced
    except (OSError, SafetensorError):  # damaged: they are computed again
        return None
