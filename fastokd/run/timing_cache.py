"""Cached timings of one kind of step on one machine, and the candidates that ended their process.

Two files in the user's cache. One has the timings, for later runs. The other names the candidate on
trial, and the process that tries it locks the file. A candidate that is still in an unlocked file ended
its process (a lost GPU, the kernel's out-of-memory killer) and is excluded.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastokd.checkpoint import write_durably
from fastokd.cohort.choice import Choice
from fastokd.errors import DeviceLostError, warn
from fastokd.run.autotuner import Timing


class TimingCache:
    """The two files of one ``key`` below ``root``; a folder that can't be written is no error.

    Within the ``with`` block :meth:`on_trial` records candidates. Of several processes that measure the
    same step at the same time, one records.
    """

    def __init__(self, root: Path, key: Mapping[str, Any]) -> None:
        text = json.dumps(key, sort_keys=True)
        self.key = json.loads(text)
        self.path = root / "engines" / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
        self._trial: int | None = None

    def __enter__(self) -> TimingCache:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._trial = os.open(self.path.with_suffix(".trial"), os.O_RDWR | os.O_CREAT, 0o644)
            # lockf locks for this process only: a forked loader doesn't share the lock.
            fcntl.lockf(self._trial, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._close()
        if self._trial is not None:
            with suppress(ValueError, TypeError):  # an empty file: no trial was cut off
                self.exclude(Choice(**json.loads(os.pread(self._trial, 4096, 0))))
                self.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(self) -> dict[Choice, Timing]:
        """The timings; none if the file is missing, damaged or of another version."""
        try:
            found = json.loads(self.path.read_bytes())
            if found["key"] != self.key:
                return {}
            timings = [Timing.from_json(values) for values in found["timings"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        return {timing.choice: timing for timing in timings}

    def write(self, timings: Iterable[Timing]) -> None:
        """Adds the timings that are final."""
        known = self.read() | {timing.choice: timing for timing in timings if timing.final}
        rows = [dataclasses.asdict(timing) for timing in known.values()]
        content = json.dumps({"key": self.key, "timings": rows}, indent=1) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self.path, content.encode())
        except OSError as error:
            warn(f"the timings of engines can't be kept: {error}")

    def exclude(self, choice: Choice) -> None:
        """Excludes a candidate from later trials."""
        note = f"excluded: its last trial ended the process (known by {self.path})"
        self.write([Timing(choice, note=note, failed=True)])

    @contextmanager
    def on_trial(self, choice: Choice) -> Iterator[None]:
        """Excludes ``choice`` if the process ends within the block, but not if it is stopped."""
        if self._trial is not None:
            with suppress(OSError):  # a full disk is no reason to stop a run
                os.pwrite(self._trial, json.dumps(dataclasses.asdict(choice)).encode(), 0)
                os.fsync(self._trial)
        try:
            yield
        except DeviceLostError:
            self.exclude(choice)
            raise
        finally:
            self.clear()

    def clear(self) -> None:
        """Records that no candidate is on trial."""
        if self._trial is not None:
            with suppress(OSError):
                os.ftruncate(self._trial, 0)

    def _close(self) -> None:
        if self._trial is not None:
            os.close(self._trial)
            self._trial = None
