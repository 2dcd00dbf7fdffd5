"""Waiting for readers of files: long waits are warned about, and their end is explained."""

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
# Seconds of a wait before the first warning; each next warning comes after twice as many.
TELL_AFTER = 30.0
# Errors of an exhausted machine. They aren't the fault of the file that was being read.
EXHAUSTED = {
    errno.EMFILE: "raise `ulimit -n`, or choose fewer --workers",
    errno.ENFILE: "close other programs, or choose fewer --workers",
    errno.ENOMEM: "free memory, or choose fewer --workers",
    errno.EAGAIN: "raise the limit on processes, or choose fewer --workers",
}


def exhaustion(error: BaseException) -> str:
    """Advice where ``error`` says that the machine is out of a resource; else ""."""
    if isinstance(error, MemoryError):
        return EXHAUSTED[errno.ENOMEM]
    return EXHAUSTED.get(error.errno or 0, "") if isinstance(error, OSError) else ""


def exhausted(error: BaseException, doing: str) -> LoaderError | None:
    """The error to raise where the machine ran out of a resource while ``doing``; else None."""
    advice = exhaustion(error)
    if not advice:
        return None
    said = getattr(error, "strerror", None) or "out of memory"
    return LoaderError(f"{said} while {doing}: {advice}")


def no_more_threads(error: RuntimeError, workers: int) -> LoaderError:
    """The error to raise for Python's "can't start new thread"."""
    return LoaderError(
        f"{error}: raise the limit on processes and threads, or choose fewer --workers (now {workers})"
    )


class Patience:
    """Warns about one wait, at growing intervals."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._next = TELL_AFTER

    @property
    def passed(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds until the next warning."""
        return max(0.0, self._next - self.passed)

    def tell(self, what: str) -> None:
        """Warns that the wait goes on, if it is time."""
        if self.left == 0:
            warn(f"{self.passed:.0f} s of waiting for {what}: is the disk slow, or hung?")
            self._next *= 2


def by_threads(
    work: Callable[[T], R], items: Sequence[T], workers: int, at: Callable[[T], str]
) -> Iterator[R]:
    """Runs ``work`` on each item in ``workers`` threads and yields the results in order. After an
    error no further item is started.

    Args:
        at: describes an item, for a warning about a long wait.

    Raises:
        LoaderError: no thread can be started.
    """
    pool = ThreadPoolExecutor(workers)
    try:
        try:
            made: list[Future[R]] = [pool.submit(work, item) for item in items]
        except RuntimeError as error:
            raise no_more_threads(error, workers) from error
        for item, future in zip(items, made, strict=True):
            patience = Patience()
            while not wait([future], patience.left + 0.1).done:
                patience.tell(at(item))
            yield future.result()
    except BaseException:
        # Ctrl-C must not wait for a disk that hangs.
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


class Watch:
    """For waits that can't be interrupted: a thread warns about long ones within ``with watch:``.

    Args:
        at: describes what is waited for. That thread calls it.
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
        """Stops the thread."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(TELL_AFTER / 10):
            patience = self._patience
            if patience is not None:
                patience.tell(self._at())
