"""How long tuning takes at most, and how a signal ends it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from fastokd.cohort import Choice
from fastokd.errors import Interrupted
from fastokd.learner import step as step_module
from fastokd.run import allowance, autotuner, trial
from fastokd.run.allowance import OVER
from fastokd.run.interruption import StopRequest
from fastokd.run.tuning import tune
from tests.run.tuned import (
    ENGINES,
    LONG,
    failing,
    fingerprint,
    session_of,
    slowed,
    uncompiled,
)

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize(("steps", "seconds"), [(1_500, 20.0), (20_000, 200.0)])
def test_tuning_takes_its_share_of_a_run_at_most(
    steps: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1% or 20 s after the default. What has no time left is a row, and tried by the next
    run; what is compiled, too. The limit is said before the second candidate is timed."""
    clock = slowed(monkeypatch, *ENGINES.values())
    monkeypatch.setattr(trial, "TIMED_STEPS", 4)  # five seconds a candidate, and there are six
    uncompiled(monkeypatch)
    said: list[tuple[float, str]] = []
    session = session_of(memory_format="auto", compile=None)
    monkeypatch.setattr(trial, "ask", lambda *told: clock.__setitem__(0, clock[0] + told[2]) or {})
    timings = tune(session, steps, lambda text: said.append((clock[0], text)))
    first, text = said[1]
    assert first == 5.0
    assert f"at most {seconds:.0f} s of a run of about {steps / 60:.1f} min" in text
    assert clock[0] <= first + seconds
    late = [timing for timing in timings if timing.note == OVER]
    assert len(late) == (1 if steps == 1_500 else 0)
    assert not any(timing.final for timing in late)


def test_a_candidate_is_cut_off_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third step of ``grouped`` ends after the limit, of four that it needs."""
    clock = slowed(monkeypatch)
    monkeypatch.setattr(allowance, "allowance", lambda step_ms, steps: 0.7)
    failing(monkeypatch, "grouped", lambda: clock.__setitem__(0, clock[0] + 0.15))
    session = session_of()
    timings = tune(session, LONG)
    assert [timing.note for timing in timings] == ["", OVER, OVER]
    assert clock[0] == pytest.approx(0.4 + 3 * 0.25)
    assert session.learner.choice == Choice()


def test_a_candidate_is_cut_off_within_its_first_step(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its forward takes longer than the limit: no update follows, and no candidate after it begins."""
    clock = slowed(monkeypatch)
    failing(monkeypatch, "grouped", lambda: clock.__setitem__(0, clock[0] + 999))
    vmap = failing(monkeypatch, "vmap", lambda: None)
    session = session_of()
    before = fingerprint(session)
    updated: list[str] = []
    real = step_module.step_unless

    def noted(*arguments: Any) -> None:
        updated.append(session.learner.choice.engine)
        real(*arguments)

    monkeypatch.setattr(step_module, "step_unless", noted)
    timings = tune(session, 1_000)
    assert [timing.note for timing in timings] == ["", OVER, OVER]
    assert not any(timing.failed for timing in timings)
    assert set(updated) == {"loop"}
    assert vmap == []
    session.settled = False
    assert fingerprint(session) == before
    kept = json.loads(next(cache.rglob("*.json")).read_text())["timings"]
    assert [row["choice"]["engine"] for row in kept] == ["loop"]


@pytest.mark.parametrize(("steps", "timed"), [(1_000, 1), (100_000, 6)])
def test_long_steps_are_timed_once_and_only_where_there_is_time_for_two_candidates(
    steps: int, timed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 10 s. Tuning may take 25 s of 1,000 steps, and 30 s are needed."""
    clock = slowed(monkeypatch)
    for engine in ENGINES:
        failing(monkeypatch, engine, lambda: clock.__setitem__(0, clock[0] + 9.9))
    monkeypatch.setattr(autotuner, "SECONDS", 0.0)
    monkeypatch.setattr(autotuner, "SHARE", 0.0025)
    said: list[tuple[float, str]] = []
    session = session_of()
    timings = tune(session, steps, lambda text: said.append((clock[0], text)))
    assert said[1][0] == pytest.approx(10.0)  # the limit is known after one step
    assert said[1][1].startswith("measuring how the steps run fastest, for at most")
    if timed == 1:
        assert [timing.note for timing in timings] == [OVER] * 3
        assert clock[0] == pytest.approx(10.0)
        assert "* loop, eager" in said[-1][1]
    else:
        assert [timing.step_ms for timing in timings] == pytest.approx([1e4] * 3)
        assert clock[0] == pytest.approx(timed * 10.0)
    assert session.settled
    assert session.learner.choice == Choice()


def test_a_faster_candidate_does_not_lower_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's step takes 10 s, and the limit is 30 s; of the grouped one's 2 s it would be 6 s."""
    clock = slowed(monkeypatch)
    for engine, seconds in (("loop", 9.9), ("grouped", 1.9), ("vmap", 9.9)):
        failing(monkeypatch, engine, lambda s=seconds: clock.__setitem__(0, clock[0] + s))
    monkeypatch.setattr(autotuner, "SECONDS", 0.0)
    monkeypatch.setattr(autotuner, "SHARE", 0.0025)
    timings = tune(session_of(), 1_200)
    assert [timing.step_ms for timing in timings][:2] == pytest.approx([1e4, 2e3])
    assert [timing.note for timing in timings][:2] == ["", ""]


@pytest.mark.parametrize("engine", ["loop", "grouped"])
def test_a_signal_within_a_trial_s_first_step_ends_it(
    engine: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two operators, without an update; nothing is excluded, and the session is as before."""
    session = session_of()
    before = fingerprint(session)
    stop = StopRequest()
    failing(monkeypatch, engine, lambda: stop._receive(signal.SIGTERM, None))
    updated: list[str] = []
    real = step_module.step_unless

    def noted(*arguments: Any) -> None:
        updated.append(session.learner.choice.engine)
        real(*arguments)

    monkeypatch.setattr(step_module, "step_unless", noted)
    said: list[str] = []
    with pytest.raises(Interrupted) as stopped:
        tune(session, LONG, said.append, stop)
    assert stopped.value.code == 143
    assert engine not in updated
    assert said[-1].startswith("timing")
    assert engine in said[-1]
    assert not session.settled
    assert fingerprint(session) == before
    assert [path.read_bytes() for path in cache.rglob("*.trial")] == [b""]
    rows = [
        row for path in cache.rglob("*.json") for row in json.loads(path.read_text())["timings"]
    ]
    assert [row["choice"]["engine"] for row in rows] == ["loop"] * (engine == "grouped")
