"""Checks that a run folder is free or resumable and has no links, and locks it."""

from __future__ import annotations

import fcntl
import os
import re
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastokd.errors import UserError, warn

# What a run may have written before its first checkpoint, and what it has written at least.
UNTRAINED = {
    *("recipe.json", "environment.json", "data.json", "checkpoints", "tuning.json"),
    *("augmentation.png", "tensorboard", "wandb"),
}
BEGUN = {"recipe.json", "checkpoints"}
# Copies of the run's teachers, and their logits.
TEACHER = re.compile(r"teacher(-\d+|_logits)?\.safetensors")

LOCKS: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _release_in_child() -> None:
    """Releases the locks in a forked loader's worker, which may outlive its parent."""
    for lock in list(LOCKS):
        lock._close()


os.register_at_fork(after_in_child=_release_in_child)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process is within this context for ``folder``.

    Raises:
        OSError: the folder is gone, or can't be read.
    """
    while True:
        held = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(held, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(held), os.stat(folder)):
                yield
                return
        finally:
            os.close(held)


def is_locked(folder: Path) -> bool:
    """Whether a process holds the :class:`FolderLock` of ``folder``; False on a file system without
    locks.

    Raises:
        OSError: the folder is gone, or can't be read.
    """
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(held)
    return False


class FolderLock:
    """The lock on a run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: int | None = None
        LOCKS.add(self)

    def check(self, resume: bool) -> None:
        """Checks that a run can begin or resume here; writes nothing.

        Raises:
            UserError: a new run's folder holds something, there is no run to resume, there is a link in
                the folder, or it can't be created.
        """
        if resume:
            self._refuse_links()
            if not (self.path / "checkpoints").is_dir():
                raise UserError(f"there is no run to resume in {self.path}: leave --resume out")
            return
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: choose another --out")
        if self.path.exists() and not self._is_free():
            raise UserError(
                f"{self.path} exists already and is never overwritten: add --resume to continue it, "
                "or choose another --out"
            )
        self._refuse_links()
        parent = self.path
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"the run folder {self.path} can't be made: {parent} can't be written")

    def take(self) -> bool:
        """Locks the folder until :meth:`release` or the end of the process; False if the file system has
        no locks.

        Raises:
            UserError: another process holds the lock.
        """
        self._held = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # perhaps by :func:`is_locked`, for an instant
                time.sleep(0.05)
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise UserError(
                f"another run uses {self.path}: wait for it, or choose another --out"
            ) from error
        except OSError as error:  # a file system without locks
            warn(f"{self.path} can't be locked: {error}")
            return False
        return True

    def release(self) -> None:
        """Releases the lock."""
        if self._held is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(self._held, fcntl.LOCK_UN)
            self._close()

    def _close(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _refuse_links(self) -> None:
        """Raises if the folder holds a link, through which a run would write elsewhere."""
        inside = [self.path / "checkpoints"]
        for folder in (self.path, self.path / "checkpoints"):
            inside += folder.iterdir() if folder.is_dir() else []
        for entry in (self.path, *inside):
            if entry.is_symlink():
                raise UserError(
                    f"{entry} is a symbolic link to {os.readlink(entry)}, and a run doesn't write "
                    "through links: name the folder itself or put the file back"
                )

    def _is_free(self) -> bool:
        """Whether nothing was trained in the folder: it is empty but for an empty ``checkpoints/``, or a
        run ended before its first checkpoint.

        Raises:
            UserError: that run isn't over.
        """
        if not self.path.is_dir():
            return False
        found = _whole(self.path)
        if (self.path / "checkpoints").is_dir() and _whole(self.path / "checkpoints"):
            return False
        if found <= {"checkpoints"}:
            return True
        found = {name for name in found if not TEACHER.fullmatch(name)}
        if not BEGUN <= found <= UNTRAINED:
            return False
        if self._held is not None:
            return True
        locked = self.take()
        self.release()
        return locked  # without locks another process may use the folder


def _whole(folder: Path) -> set[str]:
    """The names in ``folder`` without temporary files of killed writers."""
    names = {entry.name for entry in folder.iterdir()}
    return {name for name in names if not (name.startswith(".") and ".tmp" in name)}
