"""One candidate: its trial changes no state; one that can't run is a row, and the run continues."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

import fastokd
from fastokd.cohort import Choice
from fastokd.errors import DeviceLostError, UserError
from fastokd.learner import state as state_module
from fastokd.learner import step
from fastokd.learner.recording import CaptureError
from fastokd.learner.step import training_step
from fastokd.recipe.names import recipe
from fastokd.run import allowance, trial, tuning
from fastokd.run.build import build
from fastokd.run.options import RunOptions
from fastokd.run.session import Session
from fastokd.run.trial import ask, job, time_compiled, time_here, trial_here
from fastokd.run.tuning import tune, untouched
from tests.learner.every_method import COMPILES
from tests.run.tuned import (
    AUTO,
    LONG,
    failing,
    fingerprint,
    raising,
    recorded,
    session_of,
    small,
    uncompiled,
)

pytestmark = pytest.mark.usefixtures("cache")
CLOSED = "made cpu unusable for this process"
GROUPED = Choice("grouped")


def begun(session: Session, steps: int) -> str:
    """Takes some steps; returns the fingerprint."""
    session.begin_epoch()
    for index in range(steps):
        session.begin_step(8)
        training_step(session.learner, *session.stream.batch(0, index))
    return fingerprint(session)


@pytest.mark.parametrize(("steps", "precision"), [(0, "fp32"), (2, "fp32"), (2, "fp16")])
def test_trials_leave_no_trace(steps: int, precision: str) -> None:
    """Before the first step, without optimizer states, and after two steps."""
    session = session_of(precision=precision)
    before = begun(session, steps)
    with untouched(session) as put_back:
        for choice in (GROUPED, Choice("loop", False, "contiguous"), Choice("vmap")):
            assert time_here(session, choice, None).step_ms
        torch.rand(3)
        assert fingerprint(session) != before
        put_back()
        assert fingerprint(session) == before
        torch.rand(3)
    assert fingerprint(session) == before


def memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore of it")


@pytest.mark.parametrize(
    ("error", "precision"),
    [
        (memory(), "fp32"),
        (RuntimeError("vmap: no batching rule"), "fp16"),
        (TypeError(""), "fp32"),
    ],
)
def test_a_candidate_that_fails_is_a_row(
    error: Exception, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second step of its trial; the session is restored, and the run continues."""
    failing(monkeypatch, "grouped", raising(error), after=1)
    session = session_of(precision=precision)
    before = begun(session, 2)
    timings = tune(session, LONG)
    assert [timing.failed for timing in timings] == [False, True, False]
    first = str(error).splitlines()[:1] or [""]
    assert timings[1].note == f"{type(error).__name__}: {first[0]}".rstrip(": ")
    session.settled = False
    session.learner.adopt(Choice())
    assert fingerprint(session) == before
    plain = session_of(precision=precision)
    begun(plain, 3)
    session.begin_step(8)
    training_step(session.learner, *session.stream.batch(0, 2))
    assert fingerprint(session) == fingerprint(plain)


@pytest.mark.parametrize(("precision", "place"), [("fp32", "optimizer"), ("fp16", "scaler")])
def test_a_step_that_fails_half_way_through_its_update_is_undone(
    precision: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are moved and gradients are there; or those are unscaled and fp16's scale, which
    must follow, isn't updated. It is the last candidate: no later step clears the gradients."""
    session = session_of(precision=precision)
    before, last = begun(session, 1), Choice("vmap")
    owner, name = {
        "optimizer": (step, "step_unless"),
        "scaler": (torch.amp.GradScaler, "update"),
    }[place]
    real = getattr(owner, name)

    def half(*arguments: Any) -> None:
        if session.learner.choice != last or place == "optimizer":
            real(*arguments)
        if session.learner.choice == last:
            raise RuntimeError("half-way")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, half)
        timings = tune(session, LONG)
    assert timings[-1].note == "RuntimeError: half-way"
    session.settled = False
    session.learner.adopt(Choice())
    assert fingerprint(session) == before
    session.begin_step(8)
    training_step(session.learner, *session.stream.batch(0, 1))
    assert session.learner.guard.read() is None


def test_numbers_are_drawn_as_before_after_a_failed_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded(monkeypatch, {"grouped": RuntimeError("not permitted when stream is capturing")})
    session = session_of(capture=True)
    before = fingerprint(session)
    expected = torch.rand(5, generator=torch.Generator().set_state(torch.get_rng_state()))
    with untouched(session):
        assert time_here(session, Choice("grouped", capture=True), None).failed
    assert fingerprint(session) == before
    assert torch.equal(torch.rand(5), expected)


def test_a_failed_candidate_lets_go_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its frames are freed before the next candidate runs; its gradients after the trial."""
    held: list[weakref.ref[torch.Tensor]] = []

    def fail() -> None:
        activations = torch.ones(1000)
        held.append(weakref.ref(activations))
        try:
            raise ValueError("the cause")
        except ValueError as error:
            cause = error  # the frame and the error refer to each other
        raise RuntimeError("too much") from cause

    failing(monkeypatch, "grouped", fail, after=1)
    session = session_of()
    gc.disable()
    try:
        with untouched(session):
            assert time_here(session, GROUPED, None).failed
            assert held[0]() is None
    finally:
        gc.enable()
    assert all(parameter.grad is None for parameter in session.learner.parameters())


def test_what_the_default_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other candidate could run; out of memory has the message of training."""
    session = session_of()
    before = fingerprint(session)
    with monkeypatch.context() as patch:
        failing(patch, "loop", raising(RuntimeError("the loop is broken")))
        with pytest.raises(RuntimeError, match="the loop is broken"):
            tune(session, LONG)
        assert fingerprint(session) == before
    session.learner.cohort.register_forward_pre_hook(_too_many)
    with pytest.raises(UserError, match=r"a step of 8 images doesn't fit.*--batch-size 4"):
        tune(session, LONG)


def _too_many(_module: Any, images: tuple[torch.Tensor, ...]) -> None:
    if len(images[0]) > 4:
        raise memory()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_interrupt_and_exit_propagate(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of()
    before = fingerprint(session)
    with monkeypatch.context() as patch:
        failing(patch, "grouped", raising(error))
        with pytest.raises(type(error)):
            tune(session, LONG)
    assert fingerprint(session) == before
    # The candidate didn't fail: it is tried again.
    assert [timing.failed for timing in tune(session_of(), LONG)] == [False] * 3


def test_a_lost_gpu_ends_the_process_and_its_candidate_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost: list[bool] = []

    def fault() -> None:
        lost.append(True)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def restoring(*arguments: object) -> None:
        assert not lost  # such a device can't be used

    session = session_of()
    with monkeypatch.context() as patch:
        for module in (trial, tuning):
            patch.setattr(module, "is_lost", lambda device: bool(lost))
        failing(patch, "grouped", fault)
        patch.setattr(state_module, "set_random_state", restoring)
        with pytest.raises(DeviceLostError, match=f"^grouped, eager, channels_last {CLOSED}"):
            tune(session, LONG)
    assert fastokd.errors.UserError in DeviceLostError.__mro__
    calls = failing(monkeypatch, "grouped", lambda: None)
    again = session_of()
    timings = tune(again, LONG)
    assert "its last trial ended the process" in timings[1].note
    assert [timing.failed for timing in timings] == [False, True, False]
    assert calls == []


@pytest.mark.parametrize("short", [True, False])
def test_a_capture_without_memory_is_tried_again(
    short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another run, when other programs may have left more."""
    told = job(session_of(), Choice("loop", True))

    def refuse(*_: object) -> None:
        why = torch.OutOfMemoryError("full") if short else RuntimeError("it waits")
        raise CaptureError("the step can't be captured") from why

    monkeypatch.setattr(trial, "time_steps", refuse)
    answer, _ = trial.trial_here(told)
    assert (answer["failed"], answer["final"]) == (True, not short)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dml@2/torchvision:mobilenet_v2/digits", "can't draw the masks of net.classifier.0"),
        ("dml@2/timm:resnet10t/digits", ""),
    ],
)
def test_a_network_of_another_library_trains_by_default(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16: vmap has no rule for such a norm with mixed dtypes."""
    monkeypatch.setattr(tuning, "SAVABLE", 1e6)  # measures in spite of so few steps
    monkeypatch.setattr(allowance, "allowance", lambda step_ms, steps: 600.0)
    options = {**AUTO, "precision": "bf16", "memory_format": "channels_last"}
    run = fastokd.train(
        recipe(name, batch_size=4), out=tmp_path / "run", max_steps=2, eval_every=99, **options
    )
    rows = json.loads((run.folder / "tuning.json").read_text())["timings"]
    eager = {row["choice"]["engine"]: row for row in rows if not row["choice"]["compile"]}
    assert "can't stack" in eager["grouped"]["note"]
    assert says in eager["vmap"]["note"]
    assert (eager["vmap"]["step_ms"] is None) == bool(says)  # a busy machine adds notes of its own
    assert run.metrics[-1]["step"] == 2


def test_compiling_must_be_able_to_pay_for_itself() -> None:
    short = time_compiled(session_of(), Choice("loop", True), 1000, 100.0)
    assert short.step_ms is None
    assert not short.final
    assert "could save 30 s" in short.note


OWN_PLACE = {"device", "precision", "engine", "compile", "teacher", "out", "resume", "init"}


def test_the_worker_takes_the_options_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All options except those in :data:`OWN_PLACE`."""
    others = {"accumulate": 2, "clip_norm": 0.5, "skip_nonfinite": 3, "out": tmp_path}
    session = session_of(**others, capture=False)
    told = json.loads(json.dumps(job(session, Choice("grouped", True, "contiguous"))))
    options = RunOptions(**told["options"])
    for field in fields(RunOptions):
        if field.name not in OWN_PLACE | {"memory_format", "streams"}:
            assert getattr(options, field.name) == getattr(session.options, field.name), field.name
    assert (options.engine, options.compile, options.memory_format) == (
        "grouped",
        True,
        "contiguous",
    )
    uncompiled(monkeypatch)
    made: list[Session] = []

    def noting(*arguments: Any, **how: Any) -> Session:
        made.append(build(*arguments, **how))
        return made[-1]

    monkeypatch.setattr(trial, "build", noting)
    assert trial_here(told)[0]["step_ms"] > 0
    assert made[0].learner.choice == Choice("grouped", True, "contiguous")
    assert made[0].options == options


@pytest.mark.parametrize("case", ["a teacher", "crops of images on disk", "no method here"])
def test_the_worker_takes_the_recipe_of_the_run(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compiled = uncompiled(monkeypatch)
    one = small()
    if case == "a teacher":
        fastokd.train(
            recipe("baseline/resnet8/digits", batch_size=50, epochs=1),
            out=tmp_path / "teacher",
            max_steps=1,
            engine="loop",
            **AUTO,
        )
        one = recipe("kd/resnet8/digits", batch_size=8)
    session = session_of(one, teacher=tmp_path / "teacher" if one.method == "kd" else None)
    told = job(session, Choice("loop", True))
    assert told["recipe"]["resized_crop"] is False
    if case == "no method here":
        told["recipe"]["method"] = "nowhere:Method"
    answer = trial_here(json.loads(json.dumps(told)))[0]
    if case == "no method here":
        assert answer["failed"]
        assert "nowhere:Method can't be loaded" in answer["note"]
    else:
        assert answer["step_ms"] > 0
        assert compiled


def test_a_compiled_candidate_without_memory_is_tried_again_by_another_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run itself uses memory on the same device; any other error is cached."""
    told = job(session_of(), Choice("loop", True))
    for error, final in ((memory(), False), (RuntimeError("no lowering"), True)):
        monkeypatch.setattr(trial, "build", lambda *_, e=error, **__: raising(e)())
        answer = trial_here(json.loads(json.dumps(told)))[0]
        assert answer["failed"]
        assert answer["final"] == final
        assert trial.Timing(Choice(), **answer).note.startswith(type(error).__name__)


@pytest.mark.proof
@COMPILES
def test_a_compiled_candidate_answers_from_its_own_process() -> None:
    session = session_of(small(batch_size=4), compile=True)
    timing = time_compiled(session, Choice("loop", True), 10**6, 10**3)
    assert timing.note == ""
    assert timing.step_ms is not None
    assert timing.compile_seconds > 1


def spawns(job: Any) -> Any:
    subprocess.run(["sleep", "600"], check=False)


def chatty(job: Any) -> Any:
    print("bye")
    return {"step_ms": 2.0}, None


def failing_worker(job: Any) -> Any:
    raise ValueError("no compiler")


def launched_size(job: Any) -> Any:
    return {"note": os.environ.get("WORLD_SIZE", "alone")}, None


def asked(make: Any, seconds: float = 30.0, stopped: Callable[[], bool] = lambda: False) -> Any:
    return ask(f"{__name__}:{make.__name__}", {}, seconds, stopped)


def test_a_candidate_that_takes_too_long_is_killed_with_all_that_it_started() -> None:
    started = time.monotonic()
    assert asked(spawns, 1.0) == {"note": "killed after 1 s"}
    stopped = {"note": "not timed: the run was stopped", "final": False}
    assert asked(spawns, 600.0, lambda: True) == stopped
    assert time.monotonic() - started < 60
    assert asked(chatty) == {"step_ms": 2.0}
    answer = asked(failing_worker)
    assert answer == {"note": "it failed: ValueError: no compiler", "failed": True}
    assert asdict(trial.Timing(Choice(), **answer))["failed"]


def test_the_worker_is_alone_though_torchrun_started_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert asked(launched_size) == {"note": "alone"}
