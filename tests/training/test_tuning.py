"""engine="auto": measured, kept, and without a trace."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastokd
from fastokd.cohort import Choice
from fastokd.cohort.autotuner import Timing, TimingCache, pick, table
from fastokd.cohort.grouped import GroupedStudents
from fastokd.cohort.loop import LoopStudents
from fastokd.cohort.vmapped import VmapStudents
from fastokd.recipes import Recipe, recipe
from fastokd.training import tuning
from fastokd.training.session import RunOptions, Session
from fastokd.training.step import training_step
from fastokd.training.tuning import ask, time_compiled, tune
from fastokd.training.untouched import untouched

AUTO: dict[str, Any] = {"quiet": True, "precision": "fp32", "impl": "torch", "ema": 0.9}
LAST = {"compile": False, "memory_format": "channels_last"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuning, "cache_root", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def small(**changes: object) -> Recipe:
    return recipe(
        "okddip-branch/resnet8/digits", **{"epochs": 2, "students": 2, "batch_size": 8, **changes}
    )


def fingerprint(session: Session) -> str:
    """A digest of everything that a step could move."""
    tensors, facts = session.state()
    digest = hashlib.sha256(repr(facts).encode())
    for key, value in sorted(tensors.items()):
        digest.update(key.encode() + repr((value.shape, value.stride())).encode())
        digest.update(value.contiguous().numpy().tobytes())
    grads = [p.grad is None for p in session.parameters()]
    where = [str(session.choice), session.cohort.training, session.cohort.engine]
    return digest.hexdigest() + repr((grads, where, torch.rand(1, generator=_next_draw())))


def _next_draw() -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return generator


@pytest.mark.parametrize("steps", [0, 2])
def test_trials_leave_no_trace(steps: int) -> None:
    """Before the first step, when optimizers have no state, and in mid-run."""
    session = Session(small(), RunOptions(**AUTO))
    session.begin_epoch()
    for index in range(steps):
        session.begin_step(8)
        training_step(session, *session.stream.batch(0, index))
    before = fingerprint(session)
    with untouched(session):
        for choice in (Choice("grouped"), Choice("loop", False, "contiguous"), Choice("vmap")):
            assert tuning.time_eager(session, choice, None).step_ms
        torch.rand(3)
        assert fingerprint(session) != before
    assert fingerprint(session) == before


def slowed(monkeypatch: pytest.MonkeyPatch, *slow: type) -> None:
    """A clock that only the engines move: by 1 s in a call of a slow one, else by 0.1 s."""
    now = [0.0]
    monkeypatch.setattr(tuning, "clock", lambda: now[0])
    for engine in (LoopStudents, GroupedStudents, VmapStudents):
        call: Callable[..., Any] = engine.__call__
        seconds = 1.0 if engine in slow else 0.1

        def timed(
            self: Any, x: Any, call: Callable[..., Any] = call, seconds: float = seconds
        ) -> Any:
            now[0] += seconds
            return call(self, x)

        monkeypatch.setattr(engine, "__call__", timed)


@pytest.mark.parametrize("slow", ["loop", "others"])
def test_the_choice_follows_the_measurement(
    slow: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(monkeypatch, *([LoopStudents] if slow == "loop" else [GroupedStudents, VmapStudents]))
    session = Session(small(), RunOptions(**AUTO, memory_format="channels_last", compile=False))
    said: list[str] = []
    timings = tune(session, 1000, said.append)
    assert [timing.choice.engine for timing in timings] == ["loop", "grouped", "vmap"]
    assert session.cohort.engine == ("grouped" if slow == "loop" else "loop")
    assert session.settled
    assert "* " + session.cohort.engine in said[0]
    # What is known isn't measured again, for a short run neither.
    monkeypatch.setattr(tuning, "time_eager", None)
    again = Session(small(), RunOptions(**AUTO, memory_format="channels_last", compile=False))
    tune(again, 2)
    assert again.choice == session.choice


def test_what_cannot_take_the_cohort_is_listed_with_the_reason() -> None:
    mixed = recipe(
        "okddip-network/resnet8/digits", model="resnet8+resnet14", students=2, batch_size=8
    )
    session = Session(mixed, RunOptions(**AUTO, memory_format="channels_last", compile=False))
    said: list[str] = []
    timings = tune(session, 1000, said.append)
    assert session.cohort.engine == "loop"
    assert [timing.step_ms is None for timing in timings] == [False, True, True]
    assert said[0].count("not a mixed cohort: use loop") == 2


def test_a_short_run_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "time_eager", None)
    session = Session(small(), RunOptions(**AUTO))
    timings = tune(session, 100)
    assert session.choice == Choice()
    assert all("100 steps are too few" in timing.note for timing in timings)


def test_a_run_keeps_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(session: Session, steps: int, known: object) -> list[Timing]:
        return [Timing(Choice("loop"), 9.0), Timing(Choice("grouped"), 1.0)]

    monkeypatch.setattr(tuning, "_measure", fixed)
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


def test_compiling_must_pay_for_itself() -> None:
    """What it saves over the run against what it takes."""
    timings = [Timing(Choice("loop"), 100.0), Timing(Choice("loop", True), 80.0, 60.0)]
    assert pick(timings, 1000) == Choice("loop")
    assert pick(timings, 10_000) == Choice("loop", True)
    # Within what timings scatter, the first stays.
    assert (
        pick([Timing(Choice("loop"), 100.0), Timing(Choice("vmap"), 98.0)], 10**6).engine == "loop"
    )
    assert "compiled in 60 s" in table(timings, Choice())
    session = Session(small(), RunOptions(**AUTO))
    short = time_compiled(session, Choice("loop", True), 1000, 100.0)
    assert short.step_ms is None
    assert not short.final
    assert "could save 30 s" in short.note


@pytest.mark.proof
def test_a_compiled_candidate_answers_from_its_own_process() -> None:
    session = Session(small(batch_size=4), RunOptions(**AUTO, compile=True))
    timing = time_compiled(session, Choice("loop", True), 10**6, 10**3)
    assert timing.note == ""
    assert timing.step_ms is not None
    assert timing.compile_seconds > 1


def test_a_candidate_that_takes_too_long_is_killed_with_all_that_it_started() -> None:
    spawns = "import subprocess as s; s.run(['sleep', '600'])"
    started = time.monotonic()
    answer, why = ask([sys.executable, "-c", spawns], {}, 1.0)
    assert answer is None
    assert "killed after 1 s" in why
    assert time.monotonic() - started < 60
    answer, why = ask([sys.executable, "-c", "raise ValueError('no compiler')"], {}, 30.0)
    assert answer is None
    assert why == "it failed: ValueError: no compiler"


@pytest.mark.parametrize("content", ["{", "[]", '{"key": 1, "timings": []}'])
def test_a_damaged_cache_is_no_cache(cache: Path, content: str) -> None:
    known = TimingCache(cache, {"torch": "2"})
    known.path.parent.mkdir(parents=True)
    known.path.write_text(content)
    assert known.read() == []
    known.path.write_bytes(known.content([Timing(Choice(), 3.0)]))
    assert known.read() == [Timing(Choice(), 3.0)]
    assert TimingCache(cache, {"torch": "3"}).read() == []
