"""A separate process that answers one question at a time: a timed loop, or a trial of an engine.

The two processes share no memory. They exchange JSON, one object a line.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Answer = dict[str, Any]
START = "from fastokd.run.worker import main; main()"
# Seconds between two checks of ``stopped``.
LOOK_EVERY = 0.5


class WorkerEndedError(Exception):
    """The process ended or was killed before it answered; the message gives the reason."""


class Worker:
    """Calls ``make``, a ``module:function`` of a job, in a process and reads its first answer.

    The function returns its first answer, and a function that answers each further question (or None).

    Args:
        job: a JSON object.
        threads: the process's threads; None: as in this process.
        seconds: the process and its children are killed when an answer takes longer.
        stopped: they are killed when this returns true.
        quiet: keeps standard error for the message of :class:`WorkerEndedError`.

    Raises:
        WorkerEndedError: as :meth:`ask`.
    """

    def __init__(
        self,
        make: str,
        job: Answer,
        *,
        threads: int | None = None,
        seconds: float = float("inf"),
        stopped: Callable[[], bool] = lambda: False,
        quiet: bool = False,
    ) -> None:
        environment = dict(os.environ)
        environment.pop("WORLD_SIZE", None)  # torchrun sets it, but this process is alone
        # The user's methods are found on this path.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._seconds, self._stopped = seconds, stopped
        self._errors = tempfile.TemporaryFile("w+") if quiet else None  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, make],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.first = self.ask(job)
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, question: Any) -> Answer:
        """The answer to one question.

        Raises:
            WorkerEndedError: the process ended or was killed before it answered.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        end = time.monotonic() + self._seconds
        while True:
            try:
                line = self._answers.get(timeout=LOOK_EVERY)
                break
            except queue.Empty:
                if self._stopped():
                    raise WorkerEndedError("not timed: the run was stopped") from None
                if time.monotonic() > end:
                    raise WorkerEndedError(f"killed after {self._seconds:.0f} s") from None
        if not line:
            raise WorkerEndedError(self._why())
        answer: Answer = json.loads(line)
        return answer

    def _why(self) -> str:
        code = self._process.wait()
        if self._errors is None:
            return "it ended early: its own message stands above"
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or [f"it ended with {code}"]
        return f"it failed: {lines[-1][:200]}"

    def close(self) -> None:
        """Ends the process and its children."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        if self._errors is not None:
            self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main() -> None:
    """The worker process: answers go to standard output, all other output to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: Answer) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    module, _, function = sys.argv[1].partition(":")
    make = getattr(importlib.import_module(module), function)
    first, answering = make(json.loads(sys.stdin.readline()))
    say(first)
    for line in sys.stdin:
        say(answering(json.loads(line)))
