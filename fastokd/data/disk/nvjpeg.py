"""Batches whose JPEGs nvJPEG decodes on the GPU, called by torchvision; the GPU also crops and resizes.

Threads read the files. One more thread decodes each batch in a few calls and resizes its images on a
CUDA stream of its own. Pillow decodes what nvJPEG can't. With a split on the CPU the same code decodes
with libjpeg, which the tests use.
"""

from __future__ import annotations

import io
import math
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastokd.data.disk.image import first_broken, see
from fastokd.data.disk.split import Crop, DiskDraws, DiskSplit, crops_of, labels_of
from fastokd.data.views import resized_sizes
from fastokd.data.waits import Patience, exhausted, no_more_threads
from fastokd.device import is_lost
from fastokd.errors import LoaderError, in_one_line, warn

# Batches that are decoded ahead.
AHEAD = 2
# The most pixels that are decoded in one call, 100 MB in RGB. Pillow decodes larger images.
PIXELS = 1 << 25
# Pillow decodes images with sides of a larger ratio, since the device resizes a whole image for its
# centre; and those that shrink more, since the filter must fit a GPU's shared memory.
RATIO, SHRINKAGE = 4, 64
# The first bytes of a JPEG.
START = (0xFF, 0xD8)
# Two iterators decode one after the other: they share a stream, on which memory that one frees is given
# to the other, and nvJPEG's own stream doesn't wait for the kernels that still read it.
DECODING = threading.Lock()


class _Drawn(NamedTuple):
    """One image of a batch: its index in the split, the file's height and width, its crop in each view,
    and whether the device takes it if it is a JPEG."""

    sample: int
    size: list[int]
    crops: list[Crop]
    on_device: bool


def why_not(device: torch.device) -> str | None:
    """Why JPEGs can't be decoded on ``device``, found by decoding one; None if they can."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48)).save(file, "JPEG")
    try:
        _decoded([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], device)
    except Exception as error:  # a build without nvJPEG, a missing library, an error of the driver
        return in_one_line(error)
    return None


def decode(
    split: DiskSplit, drawn: Iterator[list[DiskDraws]], batch: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of ``drawn``, ``images_VBHWC`` and labels; raises as :meth:`DiskStream.batches`."""
    del batch  # this loader has no buffers to size
    split = replace(split, device=_indexed(split.device))
    # One torch thread each: else every thread would start its own threads of torch.
    readers, maker = (
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        for threads in (workers, 1)
    )
    # Batches in progress, oldest first.
    begun: deque[tuple[DiskDraws, Future[Tensor]]] = deque()

    def begin() -> None:
        while len(begun) < AHEAD and (views := next(drawn, None)) is not None:
            images = _images(split, views)
            try:
                files = [readers.submit(_read, split, image) for image in images]
                made = maker.submit(_made, split, images, len(views), files, readers)
                begun.append((views[0], made))
            except RuntimeError as error:
                raise no_more_threads(error, workers) from error

    try:
        begin()
        while begun:
            draws, made = begun.popleft()
            patience = Patience()
            while not wait([made], patience.left + 0.1).done:
                paths = [split.path(i) for i in draws.index_B[:1].tolist()]  # a batch may be empty
                patience.tell(f"the files of a batch, of which the first is {paths}")
            images_VBHWC = _result(made)
            begin()
            if split.device.type == "cuda":
                # Its memory belongs to the maker's stream.
                images_VBHWC.record_stream(torch.cuda.current_stream(split.device))
            yield images_VBHWC, labels_of(split, draws)
    finally:
        readers.shutdown(wait=False, cancel_futures=True)
        maker.shutdown(cancel_futures=True)


def _result(made: Future[Tensor]) -> Tensor:
    try:
        return made.result()
    except RuntimeError as error:
        if not _is_short(error):
            raise
        raise LoaderError(
            "the GPU ran out of memory while images were decoded on it: end other programs that use it, or "
            "begin a run with --loader torchvision"
        ) from error


def _is_short(error: RuntimeError) -> bool:
    """Whether memory ran out; torchvision wraps every error of nvJPEG in a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def _images(split: DiskSplit, views: list[DiskDraws]) -> list[_Drawn]:
    index_B = views[0].index_B
    sizes_B2, plain_B = split.sizes_N2[index_B], split.plain_N[index_B]
    on_device_B = plain_B & (sizes_B2.prod(1) <= PIXELS)
    for draws in views:
        shown_B2 = sizes_B2 if draws.box_B4 is None else draws.box_B4[:, 2:]
        longest_B, shortest_B = shown_B2.amax(1), shown_B2.amin(1)
        on_device_B = on_device_B & (longest_B <= RATIO * shortest_B)
        on_device_B &= longest_B <= SHRINKAGE * split.view.image_size
    rows = zip(
        index_B.tolist(), sizes_B2.tolist(), crops_of(views), on_device_B.tolist(), strict=True
    )
    return [_Drawn(*row) for row in rows]


def _read(split: DiskSplit, image: _Drawn) -> Tensor:
    """The bytes of a file for the device, ``[n]``; or the final pixels of any other, ``[V, S, S, 3]``.

    Raises:
        OSError: the file has changed since it was prepared.
        UserError: it can't be read.
    """
    path = split.path(image.sample)
    if image.on_device and path not in _refused(split.root):
        content = np.fromfile(path, np.uint8)
        if len(content) != int(split.bytes_N[image.sample]):
            raise OSError(f"{path} has changed")
        if tuple(content[:2]) == START:
            return torch.from_numpy(content)
    return _seen(split, image)


def _seen(split: DiskSplit, image: _Drawn) -> Tensor:
    return see(split, image.sample, image.crops)


def _made(
    split: DiskSplit,
    images: list[_Drawn],
    views: int,
    files: list[Future[Tensor]],
    readers: ThreadPoolExecutor,
) -> Tensor:
    """One batch, uint8 ``[V, B, S, S, 3]``, complete on the split's device. Runs in the maker's thread."""
    device, size = split.device, split.view.image_size
    read = [_taken(split, *one) for one in zip(images, files, strict=True)]
    stream = _stream(device) if device.type == "cuda" else None
    with DECODING, torch.cuda.stream(stream) if stream is not None else nullcontext():
        shape = (views, len(images), size, size, 3)
        images_VBHWC = torch.empty(shape, dtype=torch.uint8, device=device)
        by_device = [row for row, one in enumerate(read) if one.dim() == 1]
        refused: dict[int, Future[Tensor]] = {}
        for rows in _parts(images, by_device):
            kept, resized = [], []
            decoded = _tried([read[row] for row in rows], device)
            for row, one in zip(rows, decoded, strict=True):
                if isinstance(one, Tensor) and list(one.shape[1:]) == images[row].size:
                    kept.append(row)
                    resized.append(_resized(split, one, images[row]))
                else:
                    why = "another size" if isinstance(one, Tensor) else one
                    _refuse(split.root, split.path(images[row].sample), why)
                    refused[row] = readers.submit(_seen, split, images[row])
            if kept:
                flips = [[flip for _, flip in images[row].crops] for row in kept]
                flip_VR = torch.tensor(flips).T.to(device)
                pixels_VRCHW = torch.stack(resized, dim=1).round_().to(torch.uint8)
                pixels_VRHWC = pixels_VRCHW.permute(0, 1, 3, 4, 2)
                pixels_VRHWC = torch.where(
                    flip_VR[..., None, None, None], pixels_VRHWC.flip(3), pixels_VRHWC
                )
                images_VBHWC.index_copy_(1, torch.tensor(kept).to(device), pixels_VRHWC)
        rest = {row: one for row, one in enumerate(read) if one.dim() == 4}
        rest |= {row: _taken(split, images[row], file) for row, file in refused.items()}
        if rest:
            pixels_VRHWC = torch.stack(list(rest.values()), dim=1).to(device)
            images_VBHWC.index_copy_(1, torch.tensor(list(rest)).to(device), pixels_VRHWC)
        if stream is not None:
            stream.synchronize()
    return images_VBHWC


def _taken(split: DiskSplit, image: _Drawn, file: Future[Tensor]) -> Tensor:
    """The result of ``file``, or an error that names the file and the fix."""
    try:
        return file.result()
    except CancelledError:  # the generator was closed
        raise
    except Exception as error:
        no_more = exhausted(error, f"{split.path(image.sample)} was read")
        raise no_more or first_broken(split, [image.sample], error) from None


def _parts(images: list[_Drawn], rows: list[int]) -> Iterator[list[int]]:
    """``rows`` in parts of at most ``PIXELS`` pixels."""
    part: list[int] = []
    total = 0
    for row in rows:
        pixels = math.prod(images[row].size)
        if part and total + pixels > PIXELS:
            yield part
            part, total = [], 0
        part.append(row)
        total += pixels
    if part:
        yield part


def _tried(files: list[Tensor], device: torch.device) -> list[Tensor | str]:
    """Each file's pixels, uint8 ``[3, H, W]``; or why it isn't decoded."""
    try:
        return list(_decoded(files, device))
    except RuntimeError as error:
        if _is_short(error) or is_lost(device):
            raise
        if len(files) == 1:
            return [in_one_line(error)]
    # A call gives all images or none.
    half = len(files) // 2
    return _tried(files[:half], device) + _tried(files[half:], device)


def _decoded(files: list[Tensor], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg  # takes long to import

    device = _indexed(device)
    if device.type == "cuda":
        # torchvision allocates the images on this stream, but nvJPEG writes them on another one, which
        # doesn't wait for kernels that still read the memory's last content.
        torch.cuda.current_stream(device).synchronize()
    found: list[Tensor] = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
    return found


def _resized(split: DiskSplit, pixels_CHW: Tensor, image: _Drawn) -> Tensor:
    """The crops or the centre, not yet mirrored: float ``[V, 3, S, S]`` from 0 to 255."""
    return torch.cat([_one_resized(split, pixels_CHW, box) for box, _ in image.crops])


def _one_resized(split: DiskSplit, pixels_CHW: Tensor, box: list[int] | None) -> Tensor:
    view = split.view
    top = left = 0
    if box is not None:
        y, x, height, width = box
        pixels_CHW = pixels_CHW[:, y : y + height, x : x + width]
        size = [view.image_size] * 2
    else:
        sizes_12, corners_12 = resized_sizes(np.array([pixels_CHW.shape[1:]]), view)
        size, (top, left) = sizes_12[0].tolist(), corners_12[0].tolist()
    resized_1CHW = F.interpolate(pixels_CHW[None].float(), size, mode="bilinear", antialias=True)
    return resized_1CHW[..., top : top + view.image_size, left : left + view.image_size]


def _indexed(device: torch.device) -> torch.device:
    """torchvision makes a new decoder whenever the device differs, if only by the index."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for the process: the allocator keeps each stream's memory apart."""
    return torch.cuda.Stream(device)


@cache
def _refused(root: Path) -> set[Path]:
    """The files of a set that nvJPEG has refused: each is tried once in a process."""
    return set()


def _refuse(root: Path, path: Path, why: str) -> None:
    """Leaves a file to Pillow; warns about the first one of a set."""
    refused = _refused(root)
    if not refused:
        warn(f"nvJPEG doesn't decode {path} ({why}): Pillow decodes it and any other such file")
    refused.add(path)
