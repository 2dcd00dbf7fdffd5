"""Batches decoded by torchvision in worker processes: where DALI isn't."""

from __future__ import annotations

import gc
import signal
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from fastokd.data.broken import first_broken
from fastokd.data.disk import DiskBatch, DiskSplit, labels_of
from fastokd.errors import DataFileError

# Images that a worker makes at a time: all workers share a batch, and little shared memory is
# taken, of which containers have 64 MiB.
CHUNK = 16


class _Part(NamedTuple):
    """Images of one batch, as plain numbers: tensors would travel as open files."""

    images: list[int]
    boxes: list[list[int] | None]
    flips: list[int]


class _Decoder(Dataset[Any]):
    """Makes the images of a part, in a worker; a file at fault comes back as a sentence."""

    def __init__(self, split: DiskSplit) -> None:
        self.split = split

    def __getitem__(self, part: _Part) -> Tensor | str:
        try:
            return self._images(part)
        except Exception as error:
            # Decoders of damaged files raise nearly anything; raised here, it would come back
            # wrapped in this worker's traceback.
            found = first_broken(self.split, part.images, error)
            if isinstance(found, DataFileError):
                return str(found)
            raise

    def _images(self, part: _Part) -> Tensor:
        size = self.split.view.image_size
        images_BHWC = torch.empty(len(part.images), size, size, 3, dtype=torch.uint8)
        for row, (index, box, flip) in enumerate(zip(*part, strict=True)):
            image_CHW = self._see(index, box)
            images_BHWC[row] = (image_CHW.flip(2) if flip else image_CHW).permute(1, 2, 0)
        return images_BHWC

    def _see(self, index: int, box: list[int] | None) -> Tensor:
        view, path = self.split.view, self.split.path(index)
        if path.stat().st_size != int(self.split.bytes_N[index]):
            raise OSError(f"{path} has changed")
        with Image.open(path) as image:
            image_CHW = F.pil_to_tensor(image.convert("RGB"))
        if box is not None:
            top, left, height, width = box
            seen = F.resized_crop(image_CHW, top, left, height, width, [view.image_size] * 2)
        else:
            seen = F.center_crop(F.resize(image_CHW, [view.resize]), [view.image_size] * 2)
        assert isinstance(seen, Tensor)
        return seen


def decode(
    split: DiskSplit, plans: Iterator[DiskBatch], batch: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of ``plans``; raises as :meth:`DiskStream.batches`."""
    del batch  # this loader has no buffers to size
    # Planned and not given back yet, oldest first.
    planned: deque[DiskBatch] = deque()

    def parts() -> Iterator[_Part]:
        for plan in plans:
            planned.append(plan)
            yield from _parts(plan)

    made = iter(
        DataLoader(
            _Decoder(split),
            sampler=parts(),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_settle,
            # Else each epoch would draw from the global generator, and a resumed one once more.
            generator=torch.Generator(),
        )
    )
    size = split.view.image_size
    pinned = split.device.type == "cuda"
    try:
        part = next(made, None)
        while part is not None or planned:
            plan = planned.popleft()
            B = len(plan.index_B)
            images_BHWC = torch.empty(B, size, size, 3, dtype=torch.uint8, pin_memory=pinned)
            filled = 0
            while filled < B:
                if isinstance(part, str):
                    raise DataFileError(part)
                assert part is not None
                images_BHWC[filled : filled + len(part)] = part
                filled += len(part)
                part = next(made, None)
            yield images_BHWC.to(split.device, non_blocking=True), labels_of(split, plan)
    finally:
        # The workers end here, not when an error's traceback is collected.
        del made


def _parts(plan: DiskBatch) -> Iterator[_Part]:
    index, flips = plan.index_B.tolist(), plan.flip_B.tolist()
    boxes = [None] * len(index) if plan.box_B4 is None else plan.box_B4.tolist()
    for first in range(0, len(index), CHUNK):
        some = slice(first, first + CHUNK)
        yield _Part(index[some], boxes[some], flips[some])


def _settle(worker: int) -> None:
    """Before a worker's first part."""
    del worker
    # ^C reaches the whole group; the main process ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What was forked along isn't this process's to destroy: a pipeline of DALI's would wait for
    # threads that are not here.
    gc.freeze()
