"""A disk that refuses: from its n-th call on, or just then."""

from __future__ import annotations

import builtins
import errno
import io
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# What a full disk still allows: names may go and change.
FREEING = ("unlink", "rmdir", "rename", "replace", "open folder")
KINDS = {
    "full": errno.ENOSPC,
    "failing": errno.EIO,
    "read-only": errno.EROFS,
}


class Disk:
    """Counts what asks the disk for a change below ``root``, and refuses as it is told.

    Attributes:
        calls: how often it was asked.
        refuse_from: the first call that is refused, counted from 1; None for never. A ``failing``
            disk refuses that one alone, the others all that come after it.
        refused: how many were.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = str(root)
        self.kind = "full"
        self.calls = 0
        self.refuse_from: int | None = None
        self.refused = 0
        for name in ("replace", "rename", "link", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, self._guarded(name, getattr(os, name)))
        real_fsync, real_open = os.fsync, builtins.open

        def fsync(descriptor: int) -> None:
            self.ask("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            real_fsync(descriptor)

        def opening(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not isinstance(file, int) and ("w" in mode or "a" in mode):
                self.ask("open", os.fspath(file))
                found = real_open(file, mode, *args, **kwargs)
                return _Writer(found, self) if "b" in mode else found
            return real_open(file, mode, *args, **kwargs)

        patch.setattr(os, "fsync", fsync)
        patch.setattr(builtins, "open", opening)
        patch.setattr(io, "open", opening)

    def _guarded(self, name: str, real: Any) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            folder = kwargs.get("dir_fd")
            place = os.fspath(path)
            if folder is not None:  # shutil.rmtree walks by descriptors
                place = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), place)
            self.ask(name, place)
            return real(path, *args, **kwargs)

        return call

    def ask(self, what: str, place: str) -> None:
        """Refuses or allows one change."""
        if not place.startswith(self.root):
            return
        self.calls += 1
        if self.refuse_from is None or self.calls < self.refuse_from:
            return
        if self.kind == "failing" and self.calls > self.refuse_from:
            return
        if self.kind == "full" and what in FREEING:
            return
        self.refused += 1
        number = KINDS[self.kind]
        raise OSError(number, os.strerror(number), place)

    def refuse(self, kind: str, call: int) -> None:
        """From here on the ``call``-th change from now is refused."""
        self.kind, self.calls, self.refuse_from, self.refused = kind, 0, call, 0

    def heal(self) -> int:
        """Allows everything again; how much was refused."""
        self.refuse_from = None
        return self.refused


class _Writer:
    """A file whose write is refused after half of it."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def write(self, data: bytes) -> int:
        try:
            self.disk.ask(
                "write", self.file.name if isinstance(self.file.name, str) else str(self.file.name)
            )
        except OSError:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            raise
        return int(self.file.write(data))

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The kernel refuses what makes a file larger than ``size`` bytes, with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
