"""Decodes one image of a split on disk with Pillow, and finds the fault of a file, for all loaders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastokd.data.decode import centre, read_rgb
from fastokd.data.disk.scan import look_at
from fastokd.data.disk.split import Crop, DiskSplit
from fastokd.errors import DataFileError


def see(split: DiskSplit, index: int, crops: Sequence[Crop]) -> Tensor:
    """The views of image ``index``, ``[V, S, S, 3]``: for training its boxes, or the centre. The file is
    decoded once.

    Raises:
        OSError: the file has changed since it was prepared.
        UserError: it can't be read.
    """
    from torchvision.transforms.v2 import functional as F  # takes long to import

    view, file = split.view, split.file(index)
    if isinstance(file, Path) and file.stat().st_size != int(split.bytes_N[index]):
        raise OSError(f"{file} has changed")
    image = read_rgb(file, view.background)
    seen = []
    for box, flip in crops:
        if box is None:
            image_HWC = torch.tensor(centre(image, view))
        else:
            top, left, height, width = box
            crop_CHW = F.pil_to_tensor(image.crop((left, top, left + width, top + height)))
            image_HWC = F.resize(crop_CHW, [view.image_size] * 2).permute(1, 2, 0)
        seen.append(image_HWC.flip(1) if flip else image_HWC)
    return torch.stack(seen)


def first_broken(split: DiskSplit, indices: Iterable[int], error: Exception | None) -> Exception:
    """The error to raise after a loader's failure: it names the first faulty file of ``indices``; the
    loader's own ``error`` if there is none."""
    for index in indices:
        path, expected = split.path(index), int(split.bytes_N[index])
        try:
            look = look_at(split.file(index))
        except OSError as changed:
            return DataFileError(f"{changed}; put it back and continue with --resume")
        fault = look.fault
        if not fault and look.bytes != expected:
            fault = f"{look.bytes:,} bytes where `fastokd prepare` saw {expected:,}"
        if fault and split.place_N2 is not None:
            return DataFileError(f"{path}: {fault}; replace it, or leave it out of the set")
        if fault:
            return DataFileError(
                f"{path}: {fault}; put it back and continue with --resume, or run `fastokd prepare` "
                "again to train without it"
            )
    assert error is not None, "sizes differed a moment ago"
    return error
