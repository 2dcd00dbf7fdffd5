"""engine="auto": the fastest candidate that has the requested options, and the cached choice."""

from __future__ import annotations

import json
import signal
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import fastokd
from fastokd.cohort import Choice
from fastokd.cohort.choice import FORMATS
from fastokd.cohort.grouped import GroupedStudents
from fastokd.cohort.loop import LoopStudents
from fastokd.cohort.vmapped import VmapStudents
from fastokd.device import release_memory
from fastokd.errors import Interrupted, UserError
from fastokd.learner import step as step_module
from fastokd.learner.step import training_step
from fastokd.recipe.names import recipe
from fastokd.run import build as build_module
from fastokd.run import trial, tuning
from fastokd.run.autotuner import Timing, candidates, pick, table
from fastokd.run.session import Session
from fastokd.run.tuning import tune
from tests.run.tuned import (
    AUTO,
    ENGINES,
    LONG,
    WARM_UP,
    failing,
    raising,
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
    if capture:
        runs = runs.replace("eager", "captured").replace("compiled", "compiled + captured")
    assert str(session.learner.choice) == f"{runs}, channels_last"
    assert bool(timings) == (engine == "auto")
    weighed = engine == "auto" and compile is not False and steps == LONG
    # loop and vmap are slowed alike.
    first = {"loop"} if compile else {"grouped"}
    second = {"grouped"} if compile else {"loop", "vmap"}
    names = [name for name, _ in told]
    assert len(names) == 2 * weighed
    assert all(name in able for name, able in zip(names, (first, second), strict=False))
    assert all(job["options"]["capture"] == capture for _, job in told)
    compiled.clear()
    take(session, WARM_UP + 2)
    assert bool(compiled) == ("compiled" in runs)
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
    first, limit, *others, rows = said
    assert first == "timing 1 of 3: loop, eager, channels_last"
    assert limit.startswith(
        "measuring how the steps run fastest, for at most 20 s of a run of about"
    )
    assert [text.partition(",")[0] for text in others] == [
        "timing 2 of 3: grouped",
        "timing 3 of 3: vmap",
    ]
    assert "* " + session.learner.cohort.engine in rows
    # Cached timings aren't measured again, also in a short run.
    monkeypatch.setattr(tuning, "time_here", None)
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
    assert said[-1].count("not a mixed cohort: use loop") == 2


def test_a_short_run_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "time_here", None)
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
    one = small(batch_size=50)
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


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_stopped_while_it_is_tuned_chooses_when_it_begins_again(
    resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is taken; it is resumed, or begun by the same command."""

    def stopped(*arguments: object) -> list[Timing]:
        signal.raise_signal(signal.SIGTERM)
        return list(FASTER)

    one = small(batch_size=50)
    monkeypatch.setattr(tuning, "_measure", stopped)
    with pytest.raises(Interrupted):
        fastokd.train(one, out=tmp_path / "run", **AUTO)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["engine"] == "auto"
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    monkeypatch.setattr(tuning, "_measure", fixed(*FASTER))
    run = fastokd.train(one, out=tmp_path / "run", resume=resume, max_steps=2, **AUTO)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["engine"] == "grouped"
    whole = fastokd.train(one, out=tmp_path / "whole", max_steps=2, **AUTO)
    for name in ("train", "test"):
        assert run.last[name] == whole.last[name]


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
    assert [timing.failed for timing in timings] == [True, True, False, True]
    assert "not permitted when stream is capturing" in timings[0].note
    assert session.learner.choice == Choice("grouped", capture=True)
    take(session, WARM_UP + 2)


def test_a_capture_that_fails_for_all_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(monkeypatch, dict.fromkeys(("loop", "grouped", "vmap"), REFUSED))
    session = session_of(capture=True)
    with pytest.raises(UserError, match=r"--capture is asked for, but no engine can \(loop.*not p"):
        tune(session, LONG)
    assert list(cache.rglob("*.json")) == []  # the error may be transient: it isn't cached


def captured_unasked(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Session:
    """A session that captures by default, as on a GPU."""
    monkeypatch.setattr(build_module, "_captures", lambda options, learner: (True, ()))
    return session_of(**options)


def test_captured_candidates_come_first_and_eager_ones_after_them() -> None:
    """vmap is a candidate only where it is captured, or where nothing is."""
    rows = [str(choice) for choice in candidates(ENGINES, "contiguous", [True, False])]
    assert rows == [
        *(
            f"{engine}, captured, contiguous"
            for engine in ("loop", "loop in streams", "grouped", "vmap")
        ),
        *(f"{engine}, eager, contiguous" for engine in ("loop", "grouped")),
    ]
    assert [c.memory_format for c in candidates(["loop"], "auto", [False])] == list(FORMATS)
    assert [c.engine for c in candidates(ENGINES, "contiguous", [False])] == list(ENGINES)


def test_eager_candidates_remain_where_no_capture_succeeds(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unasked it is no error, and the eager loop alone may raise."""
    recorded(monkeypatch, dict.fromkeys(("loop", "grouped", "vmap"), REFUSED))
    slowed(monkeypatch, GroupedStudents)
    session = captured_unasked(monkeypatch)
    timings = tune(session, LONG)
    assert [timing.failed for timing in timings] == [True] * 4 + [False] * 2
    assert session.learner.choice == Choice("loop")
    with monkeypatch.context() as patch:
        other = captured_unasked(patch, memory_format="contiguous")
        failing(patch, "loop", raising(RuntimeError("the loop is broken")))
        failing(patch, "grouped", raising(RuntimeError("so is this")))
        failing(patch, "vmap", raising(RuntimeError("and this")))
        with pytest.raises(RuntimeError, match="the loop is broken"):
            tune(other, LONG)


def test_the_fastest_captured_candidate_is_taken(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(monkeypatch)
    slowed(monkeypatch, LoopStudents, VmapStudents)
    session = captured_unasked(monkeypatch)
    timings = tune(session, LONG)
    assert str(timings[0].choice) == "loop, captured, channels_last"
    assert str(session.learner.choice) == "grouped, captured, channels_last"
    take(session, WARM_UP + 2)
    assert session.learner.captured is not None
    # Timings are cached for runs with other options, too: eager vmap wasn't a candidate.
    monkeypatch.undo()
    measured: list[str] = []

    def time(session: Session, choice: Choice, *more: Any, **how: Any) -> Timing:
        measured.append(str(choice))
        return Timing(choice, 1e3)

    recorded(monkeypatch)
    monkeypatch.setattr(tuning, "cache_root", lambda: cache)
    monkeypatch.setattr(tuning, "time_here", time)
    for capture in (False, True):
        other = session_of(capture=capture)
        tune(other, LONG)
        assert other.learner.choice == Choice("grouped", capture=capture)
    assert measured == ["vmap, eager, channels_last"]


def test_a_candidate_s_graphs_are_gone_before_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that says that it is a GPU: the cache is emptied after each candidate."""
    recorded(monkeypatch)
    session = captured_unasked(monkeypatch)
    alive: list[weakref.ref[Any]] = []
    emptied: list[int] = []
    real = step_module.CapturedStep

    def noted(*arguments: Any, **how: Any) -> Any:
        assert [kept() for kept in alive] == [None] * len(alive)
        assert len(emptied) == len(alive)
        made = real(*arguments, **how)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(step_module, "CapturedStep", noted)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    gpu = torch.device("cuda")
    monkeypatch.setattr(tuning, "release_memory", lambda device: release_memory(gpu))
    tune(session, LONG)
    assert len(alive) == 4
    assert len(emptied) == 6 + 1  # and at the end of all


def test_compiling_that_fails_is_refused_only_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slowed(monkeypatch, VmapStudents)
    uncompiled(monkeypatch)
    failed = {"note": "InductorError: no compiler", "failed": True}
    answering(monkeypatch, loop=failed)
    session = session_of(compile=True)
    tune(session, 10 * LONG)
    assert session.learner.choice == Choice("grouped", True)
    answering(monkeypatch, loop=failed, grouped=failed)
    other = small(batch_size=9)  # without cached timings
    with pytest.raises(UserError, match=r"--compile is asked for, .*no compiler\): leave it out"):
        tune(session_of(other, compile=True), 10 * LONG)
    unasked = session_of(other, compile=None)
    timings = tune(unasked, 10 * LONG)
    assert unasked.learner.choice == Choice("loop")
    assert [asdict(t.choice)["compile"] for t in timings if t.failed] == [True, True]
