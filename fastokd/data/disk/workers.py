"""Batches decoded by Pillow and torchvision in worker processes, for machines without DALI."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastokd.data.disk.image import first_broken, see
from fastokd.data.disk.pool import Pool
from fastokd.data.disk.split import Crop, DiskDraws, DiskSplit, crops_of, labels_of
from fastokd.data.waits import exhausted
from fastokd.errors import DataFileError

# Crops of a chunk. It is small so that all workers share a batch and little memory is needed.
CHUNK = 16


class _Chunk(NamedTuple):
    """Images of one batch, as plain numbers: tensors would be sent as open files."""

    images: list[int]
    crops: list[list[Crop]]


def make(split: DiskSplit, chunk: _Chunk, at_row: Tensor) -> Tensor | str:
    """The images of a chunk, ``[n, V, S, S, 3]``, in a worker; or a sentence about a damaged file.
    ``at_row`` is set to the row in progress."""
    size = split.view.image_size
    views = len(chunk.crops[0])
    images_BVHWC = torch.empty(len(chunk.images), views, size, size, 3, dtype=torch.uint8)
    try:
        for row, (index, crops) in enumerate(zip(*chunk, strict=True)):
            at_row[0] = row
            images_BVHWC[row] = see(split, index, crops)
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
    return images_BVHWC


def decode(
    split: DiskSplit, drawn: Iterator[list[DiskDraws]], batch: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of ``drawn``, ``images_VBHWC`` and labels; raises as :meth:`DiskStream.batches`."""
    del batch  # this loader has no buffers to size
    first = next(drawn, None)
    if first is None:
        return
    V, rest = len(first), drawn
    images = max(1, CHUNK // V)
    # Batches in progress, oldest first.
    planned: deque[list[DiskDraws]] = deque()

    def chunks() -> Iterator[_Chunk]:
        for views in chain([first], rest):
            planned.append(views)
            yield from _chunks(views, images)

    size = split.view.image_size
    pinned = split.device.type == "cuda"
    shape = (images, V, size, size, 3)

    def file_of(chunk: _Chunk, row: int) -> Path:
        return split.path(chunk.images[row])

    with Pool(partial(make, split), chunks(), shape, workers, file_of) as pool:
        pool.feed()
        while planned:
            draws = planned.popleft()[0]
            B = len(draws.index_B)
            images_VBHWC = torch.empty(V, B, size, size, 3, dtype=torch.uint8, pin_memory=pinned)
            filled = 0
            while filled < B:
                chunk = pool.take()
                images_VBHWC[:, filled : filled + len(chunk)] = chunk.transpose(0, 1)
                filled += len(chunk)
                pool.feed()
            yield images_VBHWC.to(split.device, non_blocking=True), labels_of(split, draws)


def _chunks(views: list[DiskDraws], images: int) -> Iterator[_Chunk]:
    index, crops = views[0].index_B.tolist(), crops_of(views)
    for first in range(0, len(index), images):
        some = slice(first, first + images)
        yield _Chunk(index[some], crops[some])
