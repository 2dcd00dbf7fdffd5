"""Checks every image of a set: whether it can be decoded, its size, and its colour statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastokd.data.decode import (
    TOO_MANY,
    ImageBytes,
    fault_of,
    is_plain,
    orientation,
    upright_rgb,
    without_warnings,
)
from fastokd.data.waits import by_threads, exhausted
from fastokd.host.cpus import usable_cpus

# Images from which mean and deviation are computed: enough for three digits of ImageNet's.
SAMPLED = 20_000
CHUNK = 64


class Look(NamedTuple):
    """One file: its upright size in pixels, its size in bytes, why it can't be used or "", whether it is
    plain (:func:`fastokd.data.decode.is_plain`), :func:`sums_of` its pixels if requested, and its
    modification time (ns)."""

    height: int
    width: int
    bytes: int
    fault: str
    plain: bool = False
    sums: list[int] | None = None
    mtime: int = 0


def look_at(path: Path | ImageBytes, *, count: bool = False, pixels: bool = True) -> Look:
    """Decodes one picture, or only its header without ``pixels``. Faults are returned, not raised.

    Raises:
        LoaderError: file descriptors ran out.
    """
    if isinstance(path, ImageBytes):
        return _looked(path, len(path.getbuffer()), count, pixels)
    try:
        facts = path.stat()
    except OSError as error:
        return Look(0, 0, 0, f"can't be read: {error.strerror or error}")
    looked = _looked(path, facts.st_size, count, pixels)
    return looked._replace(mtime=facts.st_mtime_ns)


def _looked(path: Path | ImageBytes, size: int, count: bool, pixels: bool) -> Look:
    if size == 0:
        return Look(0, 0, 0, "empty")
    try:
        return _decoded(path, size, count, pixels)
    except Image.DecompressionBombError:
        return Look(0, 0, size, TOO_MANY)
    except UnidentifiedImageError:
        return Look(0, 0, size, "no image")
    except Exception as error:
        # A MemoryError is due to a large image, but a lack of descriptors isn't the file's fault.
        no_more = exhausted(error, f"{path} was looked at") if isinstance(error, OSError) else None
        if no_more is not None:
            raise no_more from error
        # Decoders raise any exception for damaged files.
        return Look(0, 0, size, f"can't be decoded: {' '.join(str(error).split())}")


def _decoded(path: Path | ImageBytes, size: int, count: bool, pixels: bool) -> Look:
    with Image.open(path) as image:
        width, height = image.size
        fault = fault_of(image)
        if fault:
            return Look(height, width, size, fault)
        plain = is_plain(image)
        if count:
            rgb = upright_rgb(image)
            return Look(rgb.height, rgb.width, size, "", plain, sums_of(np.asarray(rgb)))
        if pixels or image.format not in ("JPEG", "MPO"):  # other headers don't suffice
            # Reads all bits, but decodes a JPEG at an eighth of each side.
            eighth = image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
            image.load()
            width, height = (width, height) if eighth else image.size
        if orientation(image) > 4:
            width, height = height, width
        return Look(height, width, size, "", plain)


def scan(
    root: Path,
    paths: list[str],
    *,
    sampled: Iterable[int] = (),
    pixels: bool = True,
    workers: int = 0,
    step: Callable[[int], None] = lambda files: None,
    file_of: Callable[[int], Path | ImageBytes] | None = None,
) -> Iterator[Look]:
    """A :class:`Look` at each of ``paths`` below ``root``, in order, from several threads. Pillow
    releases the GIL while it decodes.

    Args:
        sampled: positions of the images whose colours are counted.
        pixels: False reads only headers.
        workers: threads; 0 for one per usable CPU.
        step: called with the number of files of each finished chunk.
        file_of: the picture of each place in ``paths``, if it isn't that file.
    """
    counted = set(sampled)
    opened = file_of or (lambda index: root / paths[index])
    at: dict[int, str] = {}

    def look_at_all(first: int) -> list[Look]:
        looks = []
        for i in range(first, min(first + CHUNK, len(paths))):
            at[first] = paths[i]
            looks.append(look_at(opened(i), count=i in counted, pixels=pixels))
        return looks

    with without_warnings():
        chunks = range(0, len(paths), CHUNK)
        for looks in by_threads(
            look_at_all,
            chunks,
            workers or usable_cpus(),
            lambda first: str(at.get(first, paths[first])),
        ):
            yield from looks
            step(len(looks))


def sums_of(images: np.ndarray) -> list[int]:
    """The number of pixels, the sum of each channel and of its squares, of uint8 ``[..., 3]``."""
    counts_3L = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)])
    levels = np.arange(256)
    sums = counts_3L @ np.stack((levels, levels**2), 1)
    return [int(counts_3L[0].sum()), *sums.T.ravel().tolist()]


def statistics_of(sums_N7: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, for images in [0, 1], from their :func:`sums_of`."""
    pixels, *sums = (sum(column.tolist()) for column in sums_N7.T)
    mean = tuple(total / (255 * pixels) for total in sums[:3])
    # Integer arithmetic avoids cancellation.
    variances = [
        (pixels * squares - total**2) / (255 * pixels) ** 2
        for total, squares in zip(sums[:3], sums[3:], strict=True)
    ]
    # The lower bound avoids division by zero for a constant channel.
    return mean, tuple(max(variance**0.5, 1 / 255) for variance in variances)
