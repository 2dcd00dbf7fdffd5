"""Reads MNIST's IDX files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastokd.errors import UserError

MAX_BYTES = 1 << 30
_CHUNK = 1 << 20


def read_idx(path: Path, dims: int) -> np.ndarray:
    """A uint8 array of ``dims`` dimensions, from a raw file or one ending in ``.gz``.

    The header is ``00 00 08 dims`` and the size of each dimension as a big-endian uint32. Memory grows
    with the bytes that are read, since the header may be wrong.

    Raises:
        UserError: another header, a size that doesn't match it, or a damaged ``.gz``.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            return _read(file, path, dims)  # type: ignore[arg-type]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: fetch the data set again (--download)") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): fetch it again (--download)") from error


def _read(file: BinaryIO, path: Path, dims: int) -> np.ndarray:
    header = file.read(4 + 4 * dims)
    if len(header) < 4 + 4 * dims or header[:4] != bytes((0, 0, 8, dims)):
        begins = f"begins with {header[:4].hex(' ')}" if header else "is empty"
        raise UserError(
            f"{path} {begins}, where an IDX file of {dims} dimensions begins with 00 00 08 "
            f"{dims:02x} and their sizes: fetch it again (--download)"
        )
    shape = struct.unpack(f">{dims}I", header[4:])
    size = math.prod(shape)
    if not 0 < size <= MAX_BYTES:
        raise UserError(
            f"{path} says that it holds {' x '.join(map(str, shape))} bytes: fetch it again "
            "(--download)"
        )
    content = bytearray()
    # One byte more than announced, to check that the file ends there.
    while chunk := file.read(min(_CHUNK, size + 1 - len(content))):
        content += chunk
    if len(content) != size:
        found = f"only {len(content)}" if len(content) < size else "more"
        raise UserError(
            f"{path} announces {size} bytes and has {found}: fetch it again (--download)"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)
