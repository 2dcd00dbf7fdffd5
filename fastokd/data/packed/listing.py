"""Images that are packed into files: each is a range of a shard's bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastokd.data.decode import ImageBytes
from fastokd.errors import UserError


@dataclass(frozen=True)
class Packed:
    """The images of one split.

    Attributes:
        shards: the files.
        names: a unique name of each image, which begins with its shard's.
        labels_N: int64 class ids.
        place_N3: int64: the index of the shard, the first byte and the number of bytes.
    """

    shards: tuple[Path, ...]
    names: list[str]
    labels_N: np.ndarray
    place_N3: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def file_of(self, root: Path) -> Callable[[int], ImageBytes]:
        """Reads the image at a place of the list; its errors name it below ``root``."""

        def read(index: int) -> ImageBytes:
            shard, first, count = self.place_N3[index].tolist()
            return read_range(self.shards[shard], first, count, str(root / self.names[index]))

        return read

    def select(self, keep: list[int]) -> Packed:
        """The images at these places."""
        return replace(
            self,
            names=[self.names[index] for index in keep],
            labels_N=self.labels_N[keep],
            place_N3=self.place_N3[keep],
        )


def numbered(root: Path, found: Mapping[str, Packed]) -> tuple[str, ...]:
    """The names of classes that have none: their ids, from 0 to the largest.

    Raises:
        UserError: an id isn't below the number of images, so it isn't a class's number.
    """
    last = max(int(packed.labels_N.max(initial=-1)) for packed in found.values())
    count = sum(map(len, found.values()))
    if last >= count > 0:
        raise UserError(
            f"{root} has the class id {last}, but only {count} images: number the classes from 0"
        )
    return tuple(str(label) for label in range(last + 1))


def read_range(path: Path, first: int, count: int, where: str) -> ImageBytes:
    """``count`` bytes of a file. They are read, not mapped: a file that is cut while it is mapped ends the
    process.

    Raises:
        OSError: it can't be read, or is shorter.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(handle, count, first)
    finally:
        os.close(handle)
    if len(data) != count:
        raise OSError(f"{path} has changed")
    return ImageBytes(data, where)
