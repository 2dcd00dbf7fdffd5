"""Cached timings, and the record of a process that died within a trial."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastokd.cohort import Choice
from fastokd.run import tuning
from fastokd.run.autotuner import Timing
from fastokd.run.timing_cache import TimingCache
from fastokd.run.tuning import step_key, tune
from tests.run.tuned import LONG, session_of

LOOP, GROUPED = Choice("loop"), Choice("grouped")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"key": 1, "timings": []}',
        "[" * 100_000,
        "\x00\xff",
        *(
            json.dumps(
                {"key": {"torch": "2"}, "timings": [{"choice": {"engine": "loop"}, "step_ms": ms}]}
            )
            for ms in ("fast", math.nan, -1, [])
        ),
    ],
)
def test_a_damaged_cache_is_no_cache(cache: Path, content: str) -> None:
    known = TimingCache(cache, {"torch": "2"})
    known.path.parent.mkdir(parents=True)
    known.path.write_text(content)
    assert known.read() == {}
    known.write([Timing(LOOP, 3.0), Timing(GROUPED, note="not timed", final=False)])
    assert known.read() == {LOOP: Timing(LOOP, 3.0)}
    known.write([Timing(GROUPED, 2.0)])
    assert list(known.read()) == [LOOP, GROUPED]
    assert TimingCache(cache, {"torch": "3"}).read() == {}


def test_a_folder_that_cannot_be_written_keeps_nothing(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.write_text("a file in its place")
    with TimingCache(cache, {}) as known, known.on_trial(GROUPED):
        pass
    known.write([Timing(LOOP, 3.0)])
    assert "warning: the timings of engines can't be kept" in capsys.readouterr().err
    assert known.read() == {}


def test_a_full_disk_stops_no_trial(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with TimingCache(cache, {}) as known:
        monkeypatch.setattr(os, "pwrite", full)
        with known.on_trial(GROUPED):
            tried = True
    assert tried


def test_a_live_trial_of_another_process_excludes_nothing(cache: Path) -> None:
    holds = (
        "import sys; from pathlib import Path; from fastokd.cohort import Choice\n"
        "from fastokd.run.timing_cache import TimingCache\n"
        "with TimingCache(Path(sys.argv[1]), {}) as known, known.on_trial(Choice('grouped')):\n"
        "    print('tries', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holds, str(cache)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"tries\n"
        with TimingCache(cache, {}) as known, known.on_trial(LOOP):
            assert known.read() == {}
        other.kill()
    with TimingCache(cache, {}) as known:
        assert known.read()[GROUPED].failed


def tuned_in_a_process(cache: Path, act: str) -> int:
    """Tunes a session in a process, with ``grouped`` patched; returns the exit status."""
    program = (
        "import os, signal, sys; from pathlib import Path; import pytest\n"
        "from fastokd.run import tuning\n"
        "from fastokd.run.interruption import StopRequest\n"
        "from tests.run.tuned import LONG, failing, session_of\n"
        "tuning.cache_root = lambda: Path(sys.argv[1])\n"
        # A shell starts background jobs with SIGINT ignored; children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"once = iter([True])\n"
        f"failing(pytest.MonkeyPatch(), 'grouped', lambda: next(once, False) and {act})\n"
        "with StopRequest() as stop:\n"
        "    tuning.tune(session_of(), LONG, stop=stop)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(cache)], check=False)
    return done.returncode


def kills(*names: str) -> str:
    return "[" + ", ".join(f"os.kill(os.getpid(), signal.{name})" for name in names) + "]"


@pytest.mark.parametrize(
    ("signals", "status", "excluded"),
    [
        (["SIGKILL"], -signal.SIGKILL, True),  # as the kernel does when memory runs out
        (["SIGINT", "SIGINT"], 128 + signal.SIGINT, False),
        (["SIGTERM", "SIGKILL"], -signal.SIGKILL, False),  # as a batch system does
    ],
)
def test_a_candidate_that_ends_the_process_is_left_out_and_a_user_that_does_is_not(
    signals: list[str], status: int, excluded: bool, cache: Path
) -> None:
    assert tuned_in_a_process(cache, kills(*signals)) == status
    session = session_of()
    known = TimingCache(cache, step_key(session))
    with known:
        row = known.read().get(GROUPED)
    assert (row is not None and row.failed) == excluded
    timings = tune(session, LONG)
    assert [timing.failed for timing in timings] == [False, excluded, False]
    assert [timing.step_ms is None for timing in timings] == [False, excluded, False]
    if excluded:
        assert str(known.path) in timings[1].note  # the file to remove to try it again
    assert tune(session_of(), LONG)[1].failed == excluded


def test_the_plain_loop_is_never_left_out(cache: Path) -> None:
    """No other candidate could run."""
    session = session_of()
    seen: list[str] = []

    class Watched(TimingCache):
        def on_trial(self, choice: Choice):  # type: ignore[no-untyped-def]
            seen.append(choice.engine)
            return super().on_trial(choice)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "TimingCache", Watched)
        tune(session, LONG)
    assert seen == ["grouped", "vmap"]
    assert json.loads(next(cache.rglob("*.json")).read_text())["timings"]
    assert all(os.stat(path).st_size == 0 for path in cache.rglob("*.trial"))
