"""Batches decoded by Pillow and torchvision in worker processes, for machines without DALI."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastokd.data.disk.image import first_broken, see
from fastokd.data.disk.pool import Pool
from fastokd.data.disk.split import DiskDraws, DiskSplit, labels_of
from fastokd.data.waits import exhausted
from fastokd.errors import DataFileError

# Images of a chunk. It is small so that all workers share a batch and little memory is needed.
CHUNK = 16


class _Chunk(NamedTuple):
    """Images of one batch, as plain numbers: tensors would be sent as open files."""

    images: list[int]
    boxes: list[list[int] | None]
    flips: list[int]


def make(split: DiskSplit, chunk: _Chunk, at_row: Tensor) -> Tensor | str:
    """The images of a chunk, in a worker; or a sentence about a damaged file. ``at_row`` is set to the
    row in progress."""
    size = split.view.image_size
    images_BHWC = torch.empty(len(chunk.images), size, size, 3, dtype=torch.uint8)
    try:
        for row, (index, box, flip) in enumerate(zip(*chunk, strict=True)):
            at_row[0] = row
            images_BHWC[row] = see(split, index, box, flip=bool(flip))
    except Exception as error:
        no_more = exhausted(error, f"{split.path(chunk.images[int(at_row)])} was read")
        if no_more is not None:
            raise no_more from error
        # Decoders raise any exception for damaged files. Re-raised, it would come back with this
        # worker's traceback.
        found = first_broken(split, chunk.images, error)
        if isinstance(found, DataFileError):
            return str(found)
        raise
    return images_BHWC


def decode(
    split: DiskSplit, drawn: Iterator[DiskDraws], batch: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of ``drawn``; raises as :meth:`DiskStream.batches`."""
    del batch  # this loader has no buffers to size
    # Batches in progress, oldest first.
    planned: deque[DiskDraws] = deque()

    def chunks() -> Iterator[_Chunk]:
        for draws in drawn:
            planned.append(draws)
            yield from _chunks(draws)

    size = split.view.image_size
    pinned = split.device.type == "cuda"
    shape = (CHUNK, size, size, 3)

    def file_of(chunk: _Chunk, row: int) -> Path:
        return split.path(chunk.images[row])

    with Pool(partial(make, split), chunks(), shape, workers, file_of) as pool:
        pool.feed()
        while planned:
            draws = planned.popleft()
            B = len(draws.index_B)
            images_BHWC = torch.empty(B, size, size, 3, dtype=torch.uint8, pin_memory=pinned)
            filled = 0
            while filled < B:
                chunk = pool.take()
                images_BHWC[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
                pool.feed()
            yield images_BHWC.to(split.device, non_blocking=True), labels_of(split, draws)


def _chunks(draws: DiskDraws) -> Iterator[_Chunk]:
    index, flips = draws.index_B.tolist(), draws.flip_B.tolist()
    boxes = [None] * len(index) if draws.box_B4 is None else draws.box_B4.tolist()
    for first in range(0, len(index), CHUNK):
        some = slice(first, first + CHUNK)
        yield _Chunk(index[some], boxes[some], flips[some])
