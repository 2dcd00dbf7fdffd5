"""Signals that stop a run: it finishes its step, saves a checkpoint and exits."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fastokd.errors import Interrupted
from fastokd.learner.guard import READ_EVERY
from fastokd.run.hooks import Hook

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# torchrun repeats a signal of the terminal or of Slurm within this many seconds.
ECHO = 10.0


class StopRequest:
    """A context that records the first signal in ``received`` (else None). A second one exits at once,
    if it comes more than ``echo`` seconds after the first.

    Handlers are set only in the main thread, and only for signals with the default handler (nohup
    ignores SIGHUP, for example).
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

    def __exit__(self, *_: object) -> None:
        for signum, before in self._before.items():
            signal.signal(signum, before)

    @contextmanager
    def telling(self, act: Callable[[], object]) -> Iterator[None]:
        """Within the context, the first signal calls ``act``."""
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
            os._exit(128 + signum)  # checkpoints are written atomically, so none is damaged


class Keeper(Hook):
    """Saves checkpoints between steps; stops the run after a signal.

    Args:
        save: writes a checkpoint; in the background if its argument is True.
        stop: receives the signals.
        every_steps, every_minutes: how often to save within an epoch; None for never.
        settle: handles non-finite steps, before each save and every ``READ_EVERY`` steps; it may move
            the run back, or raise.
        agree: turns this rank's (whether a save is due, the signal or 0) into that of all ranks.
        is_over: whether the run has ended, so that signals are ignored.
    """

    optional = False

    def __init__(
        self,
        save: Callable[[bool], None],
        stop: StopRequest,
        every_steps: int | None,
        every_minutes: float | None,
        settle: Callable[[], None] = lambda: None,
        agree: Callable[[bool, int], tuple[bool, int]] = lambda due, signum: (due, signum),
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self.save = save
        self._settle = settle
        self._is_over = is_over
        self.stop = stop
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.agree = agree
        self._unchecked = 0
        self.saved()

    def on_last_batch(self) -> None:
        """Reads the flag of skipped steps."""
        self._unchecked = 0
        self._settle()

    def save_now(self, background: bool = False) -> None:
        """Saves a checkpoint of the steps that were taken."""
        self.on_last_batch()
        self.save(background)
        self.saved()

    def saved(self) -> None:
        """Resets the counts after a save."""
        self._steps, self._time = 0, time.monotonic()

    def on_epoch(self, row: dict[str, Any]) -> None:
        """The epoch's checkpoint is being written with its row."""
        self.saved()
        if not self._is_over():
            self.on_batch()

    def on_step(self, images: int) -> None:
        """One step was taken."""
        self._steps += 1
        self._unchecked += 1
        if self._unchecked >= READ_EVERY:
            self.on_last_batch()
        self.on_batch()

    def on_batch(self) -> None:
        """Saves if a save is due, and stops after a signal; called between two steps or batches.

        Raises:
            Interrupted: after a signal, when the state is written.
            DiskError: after a signal, if the state can't be written. Other failed saves only warn.
        """
        by_steps = self.every_steps is not None and self._steps >= self.every_steps
        passed = (time.monotonic() - self._time) / 60
        by_time = self.every_minutes is not None and passed >= self.every_minutes
        by_time, signum = self.agree(by_time, self.stop.received or 0)
        if by_steps or by_time or signum:
            self.save_now(background=not signum)
        if signum:
            raise Interrupted(signum)
