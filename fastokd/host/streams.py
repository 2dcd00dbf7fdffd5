"""Printing that never raises: a closed or full standard stream doesn't end a run."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastokd.host.names import on_a_line


class Outlet(io.TextIOBase):
    """A text stream whose write errors are ignored.

    ``lost`` is the last error, or None. Characters that the encoding lacks are escaped.
    """

    def __init__(self, stream: Any) -> None:
        self._stream: Any = stream._stream if isinstance(stream, Outlet) else stream
        self.lost: Exception | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "errors", None) or "strict"

    def isatty(self) -> bool:
        try:
            return bool(self._stream.isatty())
        except (AttributeError, OSError, ValueError):
            return False

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return int(self._stream.fileno())

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() takes a str, not {type(text).__name__}")
        try:
            self._write(text)
        except (OSError, ValueError) as error:
            self.lost = error
        return len(text)

    def flush(self) -> None:
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError) as error:
            self.lost = error

    def _write(self, text: str) -> None:
        stream = self._stream
        if stream is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            data = text.encode(self.encoding, self.errors)
        except UnicodeEncodeError:
            data = text.encode(self.encoding, "backslashreplace")
        if not any(stream is own for own in (sys.__stdout__, sys.__stderr__)):
            stream.write(data.decode(self.encoding, self.errors))
            return
        # Bypass the stream's buffer: data left in it would fail again at exit, with exit code 120.
        stream.flush()
        while data:
            data = data[os.write(stream.fileno(), data) :]


_lost_is_told = False


def say(text: str) -> None:
    """Prints a line about a run; errors are ignored."""
    out = Outlet(sys.stdout)
    out.write("\n".join(map(on_a_line, text.split("\n"))) + "\n")
    out.flush()
    tell_lost(out)


def warn(text: str) -> None:
    """Prints a warning to stderr; errors are ignored."""
    Outlet(sys.stderr).write(f"warning: {on_a_line(text)}\n")


def tell_lost(out: Outlet) -> None:
    """Warns once if standard output can't be written."""
    global _lost_is_told
    if out.lost is not None and not _lost_is_told:
        _lost_is_told = True
        warn(f"standard output can't be written ({reason(out.lost)}): the run continues without it")


def reason(error: BaseException) -> str:
    """The operating system's message of an error."""
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def guarded() -> Iterator[Outlet]:
    """Makes both standard streams an :class:`Outlet` within the block; gives standard output."""
    global _lost_is_told
    before = sys.stdout, sys.stderr
    out, _lost_is_told = Outlet(sys.stdout), False
    sys.stdout, sys.stderr = out, Outlet(sys.stderr)
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before


def open_missing() -> None:
    """Opens /dev/null for each standard stream that the program was started without.

    Otherwise the next file that is opened would get its number, and printed text would be written
    into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)
        os.set_inheritable(number, True)
        setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
