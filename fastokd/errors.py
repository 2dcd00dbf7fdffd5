"""What a user can get wrong, said in one sentence."""

from __future__ import annotations

import difflib
import errno
import signal
from collections.abc import Iterable

from fastokd.host.streams import warn as warn


class UserError(ValueError):
    """Bad input: the message names the value, what was expected and what to do.

    The command line prints the message alone and exits with code 2; every other exception is a bug
    and keeps its traceback.
    """


# What a disk says that is full, over its quota, failing, read-only, or given too large a file.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)

# The most characters kept of an error that isn't a UserError.
LINE = 120


class DiskError(UserError):
    """The disk is full, can't be written or fails; what was written before is whole."""


class DataFileError(UserError):
    """A file of the data set vanished or changed while it was read; the batches before it were
    whole, so that a run may be continued from the one that it stopped at."""


class LoaderError(UserError):
    """Who reads the data set can't go on: a worker was killed, or the machine has no more memory,
    files or processes to give; a run may be continued as after a :class:`DataFileError`."""


class DeviceLostError(UserError):
    """The GPU refuses everything from here on, so that this process can't go on."""


class Interrupted(SystemExit):
    """A run stopped because it was asked to; its state is saved.

    Uncaught, it ends the program with the code that shells expect: 130 after ^C, 143 after SIGTERM,
    129 after SIGHUP.
    """

    code: int

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum).name


def in_one_line(error: BaseException) -> str:
    """What ``error`` says, short enough for a row of a table; all of a sentence meant for a user."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, UserError):
        return " ".join(lines)
    return f"{type(error).__name__}{': ' if lines[0] else ''}{lines[0]}"[:LINE]


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that no registry holds, with the nearest names offered."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there is {_some(names)}"
    return UserError(f"unknown {kind} {name!r}: {hint}")


def _some(names: list[str], most: int = 60) -> str:
    """All of a readable list, the beginning of a long one."""
    if not names:
        return "none"
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
