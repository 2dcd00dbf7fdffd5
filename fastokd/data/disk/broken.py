"""Which file stopped a loader: what was fed is looked at once more, oldest first."""

from __future__ import annotations

from collections.abc import Iterable

from fastokd.data.disk.scan import look_at
from fastokd.data.disk.split import DiskSplit
from fastokd.errors import DataFileError


def fault_of(split: DiskSplit, index: int) -> str:
    """What is wrong with one file, seen against the manifest; "" for nothing."""
    path = split.path(index)
    look = look_at(path)
    expected = int(split.bytes_N[index])
    if look.fault:
        return f"{path}: {look.fault}"
    if look.bytes != expected:
        return f"{path}: {look.bytes:,} bytes where `fastokd prepare` saw {expected:,}"
    return ""


def first_broken(split: DiskSplit, indices: Iterable[int], error: Exception | None) -> Exception:
    """The error to raise: the first file at fault by name; the loader's own where all are whole."""
    for index in indices:
        fault = fault_of(split, index)
        if fault:
            return DataFileError(
                f"{fault}; put it back and continue with --resume, or run `fastokd prepare` again "
                "to train without it"
            )
    assert error is not None, "sizes differed a moment ago"
    return error
