"""Sections for tests/benchmark/test_gpu_first.py, one for each way to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.gpu.child import Result


def good(result: Result) -> None:
    result.row(name="a row", ms=1.5)
    result.figure("speed", 2.0)


def raises(result: Result) -> None:
    result.row(name="before", ms=1.0)
    raise ValueError("this section can't go on")


def half(result: Result) -> None:
    """Writes half of its rows, then hangs; its child process has left its process group."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True
    )
    result.row(name="first", ms=1.0, pid=child.pid)
    time.sleep(60)


def killed(result: Result) -> None:
    result.row(name="first", ms=1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def row_fails(result: Result) -> None:
    try:
        raise RuntimeError("out of memory")
    except RuntimeError as error:
        result.fail(result.row(name="large"), error)
    result.row(name="small", ms=1.0)


def mends(result: Result) -> None:
    """Raises the first time; a file next to the report marks that."""
    mark = Path(os.environ["FAKE_MARK"])
    if not mark.exists():
        mark.touch()
        raise ValueError("not yet")
    good(result)


def package(result: Result) -> None:
    """The package is complete without an installation."""
    import fastokd.csrc
    import fastokd.kernels

    assert Path(fastokd.__file__).is_relative_to(Path.cwd())
    result.data["files"] = [path.name for path in Path(fastokd.kernels.__file__).parent.iterdir()]
