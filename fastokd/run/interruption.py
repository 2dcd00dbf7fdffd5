"""Signals that ask a run to stop: it finishes its step, saves, and leaves."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from fastokd.distributed.ranks import speaks
from fastokd.errors import DiskError, Interrupted, warn
from fastokd.learner.guard import READ_EVERY

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Seconds in which torchrun sends its processes what a terminal or Slurm has sent them already.
ECHO = 10.0


class StopRequest:
    """Listens for the signals while it is entered; a second one exits at once, if it comes more
    than ``echo`` seconds after the first.

    ``received`` is the signal, None before. Only the main thread can listen; elsewhere, and where
    somebody else's handler is in place or the signal is ignored (by nohup, say), nothing is changed.
    """

    def __init__(self, echo: float = 0.0) -> None:
        self.echo = echo
        self.received: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._told: Callable[[], object] | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                before = signal.getsignal(signum)
                if before in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[signum] = before
                    signal.signal(signum, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, before in self._before.items():
            signal.signal(signum, before)

    @contextmanager
    def telling(self, act: Callable[[], object]) -> Iterator[None]:
        """Within it ``act`` is called when the first signal comes: a second one ends the process."""
        self._told = act
        try:
            yield
        finally:
            self._told = None

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = signum, now
            if self._told is not None:
                self._told()
        elif now - self._since >= self.echo:
            os._exit(128 + signum)  # checkpoints are whole or absent, so nothing is lost


class Keeper:
    """Called between two steps: saves when it is time, and where a signal came saves and stops.

    Args:
        save: writes a checkpoint.
        stop: listens for signals.
        every_steps, every_minutes: how often to save within an epoch; None for never.
        check: looks whether the steps so far were taken, before each save and every ``READ_EVERY``
            steps; it may take the run back, or raise.
        agree: turns what this rank wishes, (whether it is time to save, the signal or 0), into what
            all ranks do at this same moment.
    """

    def __init__(
        self,
        save: Callable[[], None],
        stop: StopRequest,
        every_steps: int | None,
        every_minutes: float | None,
        check: Callable[[], None] = lambda: None,
        agree: Callable[[bool, int], tuple[bool, int]] = lambda due, signum: (due, signum),
    ) -> None:
        self.save = save
        self._check = check
        self.stop = stop
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.agree = agree
        self._unchecked = 0
        self.saved()

    def check(self) -> None:
        """Whether the steps so far were taken."""
        self._unchecked = 0
        self._check()

    def save_now(self) -> None:
        """A checkpoint of the steps that were taken."""
        self.check()
        self.save()
        self.saved()

    def saved(self) -> None:
        """Counts from here on: a checkpoint was written."""
        self._steps, self._time = 0, time.monotonic()

    def stepped(self) -> None:
        """One step was taken."""
        self._steps += 1
        self._unchecked += 1
        if self._unchecked >= READ_EVERY:
            self.check()
        self()

    def __call__(self) -> None:
        """A moment between two steps, or two batches of an evaluation.

        Raises:
            Interrupted: a signal came; the state is saved.
            DiskError: a signal came, and the state can't be saved. Without one the run goes on.
        """
        by_steps = self.every_steps is not None and self._steps >= self.every_steps
        passed = (time.monotonic() - self._time) / 60
        by_time = self.every_minutes is not None and passed >= self.every_minutes
        by_time, signum = self.agree(by_time, self.stop.received or 0)
        if by_steps or by_time or signum:
            try:
                self.save_now()
            except DiskError as error:
                if signum:
                    raise
                if speaks():
                    warn(f"{error}; training goes on, and saves when it is time again")
                self.saved()
        if signum:
            raise Interrupted(signum)
