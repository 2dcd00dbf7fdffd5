"""Errors that a user can cause. Each message is one sentence."""

from __future__ import annotations

import difflib
import errno
import os
import signal
import traceback
from collections.abc import Iterable
from pathlib import Path

from fastokd.host.streams import warn as warn


class UserError(ValueError):
    """Bad input: the message names the value, what was expected and what to do.

    The command line prints only the message and exits with code 2. Any other exception is a bug
    and keeps its traceback.
    """


# The disk is full, over its quota, failing or read-only, or the file is too large.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)

# The most characters kept of an error that isn't a UserError.
LINE = 120


class DiskError(UserError):
    """The disk is full, can't be written or fails. Files that were written before are intact."""


class DataFileError(UserError):
    """A file of the data set vanished or changed during training. All batches before it were
    complete, so that the run can be resumed from that batch."""


class LoaderError(UserError):
    """The data loader failed: a worker was killed, or memory, file handles or processes ran out. The
    run can be resumed as after a :class:`DataFileError`."""


class DeviceLostError(UserError):
    """The GPU rejects every further call, so that this process must end."""


class Interrupted(SystemExit):
    """A signal stopped a run; its state is saved.

    Uncaught, it ends the program with the exit code that shells expect: 130 after ^C, 143 after
    SIGTERM, 129 after SIGHUP.
    """

    code: int

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum).name


def in_one_line(error: BaseException) -> str:
    """The message of ``error``, cut to :data:`LINE` characters unless it is a UserError."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, UserError):
        return " ".join(lines)
    return f"{type(error).__name__}{': ' if lines[0] else ''}{lines[0]}"[:LINE]


def forget(error: BaseException | None) -> None:
    """Clears the frames of an error and of its causes, which hold a step's activations."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def as_path(name: str, value: object) -> Path:
    """``value`` as a path; a value that is neither a string nor a path raises UserError."""
    if isinstance(value, (str, os.PathLike)):
        return Path(value)
    raise wrong_type(name, value, "a path")


def wrong_type(name: str, value: object, what: str) -> UserError:
    """The error for a value of the wrong type; ``what`` describes a right one."""
    return UserError(f"{name} must be {what} (got {value!r})")


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UserError:
    """The error for an unknown name; its message offers the nearest names."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there is {_some(names)}"
    return UserError(f"unknown {kind} {name!r}: {hint}")


def _some(names: list[str], most: int = 60) -> str:
    """The names, at most ``most`` of them and the number of the rest."""
    if not names:
        return "none"
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
