"""Waiting for who reads files: every wait that lasts is told of, and what ended it is named."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from fastokd.errors import LoaderError, warn

T = TypeVar("T")
R = TypeVar("R")
# Seconds of one wait until it is told of; then again after twice as many.
TELL_AFTER = 30.0
# What a machine says that has no more to give: no fault of the file that was read just then.
EXHAUSTED = {
    errno.EMFILE: "raise `ulimit -n`, or choose fewer --workers",
    errno.ENFILE: "close other programs, or choose fewer --workers",
    errno.ENOMEM: "free memory, or choose fewer --workers",
    errno.EAGAIN: "raise the limit on processes, or choose fewer --workers",
}


def exhaustion(error: BaseException) -> str:
    """What to do where ``error`` says that the machine, not a file, is at its end; else ""."""
    if isinstance(error, MemoryError):
        return EXHAUSTED[errno.ENOMEM]
    return EXHAUSTED.get(error.errno or 0, "") if isinstance(error, OSError) else ""


def exhausted(error: BaseException, doing: str) -> LoaderError | None:
    """The error to raise where the machine is at its end while ``doing``; else None."""
    advice = exhaustion(error)
    if not advice:
        return None
    said = getattr(error, "strerror", None) or "out of memory"
    return LoaderError(f"{said} while {doing}: {advice}")


class Patience:
    """Tells of one wait, ever more seldom."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._next = TELL_AFTER

    @property
    def passed(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds until it is told of."""
        return max(0.0, self._next - self.passed)

    def tell(self, what: str) -> None:
        """Says that it goes on, if it is time."""
        if self.left == 0:
            warn(f"{self.passed:.0f} s of waiting for {what}: is the disk slow, or hung?")
            self._next *= 2


def by_threads(
    work: Callable[[T], R], items: Sequence[T], workers: int, at: Callable[[T], str]
) -> Iterator[R]:
    """``work`` of each item, in order, by so many threads. After an error the rest isn't begun.

    Args:
        at: what an item that takes long is at.

    Raises:
        LoaderError: no thread can be started.
    """
    pool = ThreadPoolExecutor(workers)
    try:
        try:
            made: list[Future[R]] = [pool.submit(work, item) for item in items]
        except RuntimeError as error:  # "can't start new thread"
            raise LoaderError(
                f"{error}: raise the limit on processes and threads, or choose fewer --workers "
                f"(now {workers})"
            ) from error
        for item, future in zip(items, made, strict=True):
            patience = Patience()
            while not wait([future], patience.left + 0.1).done:
                patience.tell(at(item))
            yield future.result()
    except BaseException:
        # ^C doesn't wait for a disk that hangs.
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


class Watch:
    """For waits that can't be left: a thread tells of those, within ``with watch:``, that last.

    Args:
        at: what is waited for. Called by that thread.
    """

    def __init__(self, at: Callable[[], str]) -> None:
        self._at = at
        self._patience: Patience | None = None
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="fastokd waits", daemon=True).start()

    def __enter__(self) -> Watch:
        self._patience = Patience()
        return self

    def __exit__(self, *_: object) -> None:
        self._patience = None

    def end(self) -> None:
        """Ends the thread."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(TELL_AFTER / 10):
            patience = self._patience
            if patience is not None:
                patience.tell(self._at())
