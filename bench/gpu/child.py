"""One section's process: ``python -m bench.gpu.child MODULE:FUNCTION FILE SECONDS [--dry-run]``.

FILE always has the results so far, so a kill loses no earlier result.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

LINES, WIDTH = 12, 240


class Result:
    """The results of a section; each addition is written at once.

    Attributes:
        data: ``figures`` (names and numbers; the first three are printed), ``rows``, ``failures``
            (lines; with any of them the section has failed) and other facts.
        dry: whether this is a dry run: tiny shapes on the CPU.
    """

    def __init__(self, path: Path, seconds: float, dry: bool) -> None:
        self.path, self.dry = path, dry
        self.ends = time.monotonic() + seconds
        self.data: dict[str, Any] = {"figures": {}, "rows": [], "failures": []}

    def left(self) -> float:
        """Seconds until the section is killed."""
        return self.ends - time.monotonic()

    def row(self, **values: Any) -> dict[str, Any]:
        """Adds a row; the caller may add values to it."""
        self.data["rows"].append(values)
        self.write()
        return values

    def figure(self, name: str, value: float) -> None:
        """Adds a number for the summary."""
        self.data["figures"][name] = value
        self.write()

    def fail(self, row: dict[str, Any], error: BaseException) -> None:
        """Records an error in ``row``; the section continues."""
        row["error"] = last_lines(error)
        name = row.get("name", "a row")
        self.data["failures"].append(f"{name}: {row['error'].splitlines()[-1]}")
        traceback.print_exception(error)
        self.write()

    def write(self) -> None:
        """Writes the results so far."""
        write_whole(self.path, json.dumps(self.data, default=str))


def write_whole(path: Path, text: str) -> None:
    """Replaces ``path`` atomically."""
    beside = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open(beside, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def last_lines(error: BaseException) -> str:
    """The end of an error's traceback."""
    return tail("".join(traceback.format_exception(error)))


def tail(text: str, lines: int = LINES) -> str:
    """The last lines of a text, each cut to :data:`WIDTH` characters."""
    return "\n".join(line[:WIDTH] for line in text.strip().splitlines()[-lines:])


def _end_with(parent: int) -> None:
    """Kills this process group when its parent process has ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Calls the section; the exit code is 1 if it raised."""
    target, file, seconds = sys.argv[1:4]
    watch = threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True)
    watch.start()
    result = Result(Path(file), float(seconds), "--dry-run" in sys.argv)
    module, function = target.split(":")
    try:
        getattr(importlib.import_module(module), function)(result)
    except Exception as error:
        traceback.print_exc()
        result.data["error"] = last_lines(error)
        sys.exit(1)
    finally:
        result.write()


if __name__ == "__main__":
    main()
