"""engine="auto": the fastest candidate that has the requested options, and the cached choice."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import fastokd
from fastokd.cohort import Choice
from fastokd.cohort.grouped import GroupedStudents
from fastokd.cohort.loop import LoopStudents
from fastokd.cohort.vmapped import VmapStudents
from fastokd.errors import Interrupted, UserError
from fastokd.learner.step import training_step
from fastokd.recipe.names import recipe
from fastokd.run import trial, tuning
from fastokd.run.autotuner import Timing, pick, table
from fastokd.run.session import Session
from fastokd.run.tuning import tune
from tests.run.tuned import (
    AUTO,
    LONG,
    WARM_UP,
    recorded,
    session_of,
    slowed,
    small,
    uncompiled,
)

pytestmark = pytest.mark.usefixtures("cache")
SHORT, MEDIUM = 50, 1_000
# The worker's timings: the loop gains most by compiling, and grouped is the fastest.
COMPILED_MS = {"loop": 90.0, "grouped": 50.0}


def answering(
    monkeypatch: pytest.MonkeyPatch, **answers: dict[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    """In place of the worker: its answer for an engine, and the jobs that it got."""
    told: list[tuple[str, dict[str, Any]]] = []

    def ask(make: str, job: dict[str, Any], *more: object) -> dict[str, Any]:
        engine = job["options"]["engine"]
        told.append((engine, job))
        plain = {"step_ms": COMPILED_MS.get(engine, 1e3), "compile_seconds": 1.0}
        return answers.get(engine, plain)

    monkeypatch.setattr(trial, "ask", ask)
    return told


def take(session: Session, steps: int) -> None:
    """Takes steps as a run does."""
    batch = session.next_batch()
    session.begin_epoch()
    for _ in range(steps):
        session.begin_step(len(batch[1]))
        training_step(session.learner, *batch)


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize(
    ("engine", "compile", "steps", "runs"),
    [
        ("auto", None, SHORT, "loop, eager"),
        ("auto", None, MEDIUM, "grouped, eager"),  # compiling takes longer than it could save
        ("auto", None, LONG, "grouped, compiled"),
        ("auto", False, SHORT, "loop, eager"),
        ("auto", False, LONG, "grouped, eager"),
        ("auto", True, SHORT, "loop, compiled"),
        ("auto", True, MEDIUM, "loop, compiled"),
        ("auto", True, LONG, "grouped, compiled"),
        ("vmap", None, LONG, "vmap, eager"),
        ("vmap", False, LONG, "vmap, eager"),
        ("vmap", True, SHORT, "vmap, compiled"),
    ],
)
def test_what_is_asked_for_runs(
    engine: str,
    compile: bool | None,
    capture: bool,
    steps: int,
    runs: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slowed(monkeypatch, LoopStudents, VmapStudents)
    recorded(monkeypatch)
    compiled = uncompiled(monkeypatch)
    told = answering(monkeypatch)
    session = session_of(engine=engine, compile=compile, capture=capture)
    timings = tune(session, steps)
    assert str(session.learner.choice) == f"{runs}, channels_last"
    assert bool(timings) == (engine == "auto")
    weighed = engine == "auto" and compile is not False and steps == LONG
    assert [name for name, _ in told] == (["loop", "grouped"] if compile else ["grouped", "loop"])[
        : 2 * weighed
    ]
    assert all(job["options"]["capture"] == capture for _, job in told)
    compiled.clear()
    take(session, WARM_UP + 2)
    assert bool(compiled) == runs.endswith("compiled")
    captured = session.learner.captured
    assert (captured is not None and None not in captured.graphs.values()) == capture


@pytest.mark.parametrize("slow", ["loop", "others"])
def test_the_choice_follows_the_measurement(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(monkeypatch, *([LoopStudents] if slow == "loop" else [GroupedStudents, VmapStudents]))
    session = session_of()
    said: list[str] = []
    timings = tune(session, SHORT, said.append)
    assert session.learner.choice == Choice()
    assert said == []
    session.settled = False
    timings = tune(session, MEDIUM, said.append)
    assert [timing.choice.engine for timing in timings] == ["loop", "grouped", "vmap"]
    assert session.learner.cohort.engine == ("grouped" if slow == "loop" else "loop")
    assert session.settled
    assert "* " + session.learner.cohort.engine in said[0]
    # Cached timings aren't measured again, also in a short run.
    monkeypatch.setattr(tuning, "time_eager", None)
    again = session_of()
    tune(again, 2)
    assert again.learner.choice == session.learner.choice


def test_what_cannot_take_the_cohort_is_listed_with_the_reason() -> None:
    mixed = recipe(
        "okddip-network/resnet8/digits", model="resnet8+resnet14", students=2, batch_size=8
    )
    session = session_of(mixed)
    said: list[str] = []
    timings = tune(session, MEDIUM, said.append)
    assert session.learner.cohort.engine == "loop"
    assert [timing.failed for timing in timings] == [False, True, True]
    assert said[0].count("not a mixed cohort: use loop") == 2


def test_a_short_run_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "time_eager", None)
    session = session_of(memory_format="auto", compile=None)
    timings = tune(session, SHORT)
    assert session.learner.choice == Choice()
    assert len(timings) == 6
    assert all("50 steps are too few" in timing.note for timing in timings)


def fixed(*timings: Timing) -> Callable[..., list[Timing]]:
    return lambda *arguments: list(timings)


FASTER = Timing(Choice("loop"), 9.0), Timing(Choice("grouped"), 1.0)


def test_a_run_keeps_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_measure", fixed(*FASTER))
    one = small(batch_size=250)
    fastokd.train(one, out=tmp_path / "run", max_steps=1, **AUTO)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["engine"] == "grouped"
    kept = json.loads((tmp_path / "run" / "tuning.json").read_text())
    assert [row["step_ms"] for row in kept["timings"]] == [9.0, 1.0]
    monkeypatch.setattr(tuning, "_measure", None)
    engines: list[str] = []
    monkeypatch.setattr(GroupedStudents, "__call__", _noting(engines, GroupedStudents.__call__))
    fastokd.train(one, out=tmp_path / "run", resume=True, max_steps=2, **AUTO)
    assert engines


def _noting(engines: list[str], call: Callable[..., Any]) -> Callable[..., Any]:
    def noted(self: Any, x: Any) -> Any:
        engines.append("grouped")
        return call(self, x)

    return noted


def test_a_run_stopped_while_it_is_tuned_chooses_when_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step runs by the default, and is saved."""

    def stopped(*arguments: object) -> list[Timing]:
        signal.raise_signal(signal.SIGTERM)
        return list(FASTER)

    one = small(batch_size=250)
    monkeypatch.setattr(tuning, "_measure", stopped)
    with pytest.raises(Interrupted):
        fastokd.train(one, out=tmp_path / "run", **AUTO)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["engine"] == "auto"
    monkeypatch.setattr(tuning, "_measure", fixed(*FASTER))
    fastokd.train(one, out=tmp_path / "run", resume=True, max_steps=2, **AUTO)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["engine"] == "grouped"


def test_the_default_stays_unless_another_is_clearly_faster_or_it_cannot_run() -> None:
    """Compiling must save more over the run than it takes."""
    timings = [Timing(Choice("loop"), 100.0), Timing(Choice("loop", True), 80.0, 60.0)]
    assert pick(timings, 1000) == Choice("loop")
    assert pick(timings, 10_000) == Choice("loop", True)
    assert "compiled in 60 s" in table(timings, Choice())
    vmap = Timing(Choice("vmap"), 98.0)
    # Within the noise of timings the first is kept.
    assert pick([Timing(Choice("loop"), 100.0), vmap], 10**6) == Choice("loop")
    assert pick([Timing(Choice("loop"), note="not timed", final=False), vmap], 9) == Choice("loop")
    killed = Timing(Choice("loop"), note="killed after 60 s")
    assert pick([killed, vmap], 9) == Choice("vmap")
    assert pick([killed, Timing(Choice("vmap"), failed=True)], 9) == Choice("loop")
    failed = Timing(Choice("loop"), failed=True)
    assert pick([failed, vmap], 9) == Choice("vmap")
    # A run too short to measure; the cache has only a failure.
    assert pick([failed, Timing(Choice("vmap"), note="not timed", final=False)], 9) == Choice(
        "vmap"
    )


REFUSED = RuntimeError("operation not permitted when stream is capturing")


def test_a_capture_that_fails_for_one_engine_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded(monkeypatch, {"loop": REFUSED, "vmap": REFUSED})
    session = session_of(capture=True)
    timings = tune(session, LONG)
    assert [timing.failed for timing in timings] == [True, False, True]
    assert "not permitted when stream is capturing" in timings[0].note
    assert session.learner.choice == Choice("grouped")
    take(session, WARM_UP + 2)


def test_a_capture_that_fails_for_all_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(monkeypatch, dict.fromkeys(("loop", "grouped", "vmap"), REFUSED))
    session = session_of(capture=True)
    with pytest.raises(UserError, match=r"--capture is asked for, but no engine can \(loop.*not p"):
        tune(session, LONG)
    assert list(cache.rglob("*.json")) == []  # the error may be transient: it isn't cached


def test_compiling_that_fails_is_refused_only_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slowed(monkeypatch, VmapStudents)
    uncompiled(monkeypatch)
    failed = {"note": "InductorError: no compiler", "failed": True}
    answering(monkeypatch, loop=failed)
    session = session_of(compile=True)
    tune(session, LONG)
    assert session.learner.choice == Choice("grouped", True)
    answering(monkeypatch, loop=failed, grouped=failed)
    other = small(batch_size=9)  # without cached timings
    with pytest.raises(UserError, match=r"--compile is asked for, .*no compiler\): leave it out"):
        tune(session_of(other, compile=True), LONG)
    unasked = session_of(other, compile=None)
    timings = tune(unasked, LONG)
    assert unasked.learner.choice == Choice("loop")
    assert [asdict(t.choice)["compile"] for t in timings if t.failed] == [True, True]
