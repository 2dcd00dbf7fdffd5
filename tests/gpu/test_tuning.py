"""Tuning on a GPU: a capture that really fails is a row, and nothing of it stays."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

import fastokd
from fastokd.cohort import ENGINES, Choice
from fastokd.errors import UserError
from fastokd.learner.captured import CapturedStep
from fastokd.learner.guard import random_state
from fastokd.learner.recording import recording
from fastokd.learner.step import training_step
from fastokd.run.autotuner import candidates
from fastokd.run.session import Session
from fastokd.run.trial import time_here
from fastokd.run.tuning import tune, untouched
from tests.run.tuned import (
    LONG,
    cache,  # noqa: F401
    failing,
    fingerprint,
    raising,
    recorded,
    session_of,
    small,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cache")]
MIB = 2**20


def draw(device: torch.device) -> torch.Tensor:
    return torch.rand(5, device=device)


def fails(device: torch.device, waits: bool) -> None:
    """A capture that draws, takes 64 MiB, and then waits for the device or raises."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    pool = torch.cuda.graph_pool_handle()
    with recording(graph, pool, stream, capture_error_mode="thread_local"):
        taken = torch.rand(16 * MIB, device=device)
        if waits:
            taken.sum().item()
        raise ValueError("the body's own")


@pytest.mark.parametrize("waits", [True, False])
def test_a_failed_capture_leaves_the_process_able_to_go_on(
    device: torch.device, waits: bool
) -> None:
    """Invalid, and valid though its body raised: numbers are drawn, memory is let go, the next
    capture is replayed."""
    if device.type == "cpu":
        pytest.skip("only a GPU has graphs")
    torch.cuda.manual_seed(3)
    draw(device)
    state = torch.cuda.get_rng_state(device)
    expected = draw(device)
    torch.cuda.set_rng_state(state, device)
    stream = torch.cuda.current_stream(device)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    with pytest.raises(UserError, match="can't be captured as a CUDA graph") as raised:
        fails(device, waits)
    assert ("capturing" in str(raised.value)) == waits
    del raised
    assert torch.cuda.current_stream(device) == stream
    assert torch.equal(draw(device), expected)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(device) < before + 32 * MIB

    torch.cuda.set_rng_state(state, device)
    step = CapturedStep(lambda images, labels: images + draw(device), device, warm_up=1)
    zeros = torch.zeros(5, device=device)
    drawn = [step(zeros, zeros).clone() for _ in range(3)]  # eager, captured and replayed, replayed
    torch.cuda.set_rng_state(state, device)
    for value in drawn:
        assert torch.equal(value, draw(device))


def bf16_session(device: torch.device) -> Session:
    return session_of(device=str(device), precision="bf16", impl="auto", capture=True)


def no_capture_of(device: torch.device, monkeypatch: pytest.MonkeyPatch, *engines: str) -> None:
    """Has these engines wait for the device in a capture; on a CPU both are stand-ins."""
    if device.type == "cpu":
        error = RuntimeError("operation not permitted when stream is capturing")
        recorded(monkeypatch, dict.fromkeys(engines, error))
    for engine in engines:
        failing(monkeypatch, engine, waits_in_a_capture)


def waits_in_a_capture() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        torch.ones((), device="cuda").item()


def test_tuning_survives_a_candidate_that_cannot_be_captured_and_one_without_memory(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_capture_of(device, monkeypatch, "grouped")
    session = bf16_session(device)
    before, random = fingerprint(session), random_state(session.learner.device)
    with monkeypatch.context() as patch:
        failing(patch, "vmap", raising(torch.OutOfMemoryError("CUDA out of memory")), after=2)
        timings = tune(session, LONG)
    # The loop, the loop in streams, grouped, vmap.
    assert [timing.failed for timing in timings] == [False, False, True, True]
    assert "capturing" in timings[2].note
    assert timings[3].note == "OutOfMemoryError: CUDA out of memory"
    assert session.learner.choice in [timing.choice for timing in timings[:2]]
    session.settled = False
    session.learner.adopt(Choice(capture=True))
    assert fingerprint(session) == before
    torch.testing.assert_close(random_state(session.learner.device), random)
    plain = bf16_session(device)
    for one in (session, plain):  # eager, captured, replayed
        batch = one.next_batch()
        one.begin_epoch()
        one.learner.cohort.train()
        one.learner.method.train()
        for _ in range(15):
            one.begin_step(len(batch[1]))
            loss = training_step(one.learner, *batch)[1].total
        assert loss.isfinite()
    first, second = ([p.detach() for p in one.learner.parameters()] for one in (session, plain))
    torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-3)


def test_the_memory_of_each_candidate_is_returned(device: torch.device) -> None:
    """Before the next one is timed: what is reserved grows by less than a candidate takes."""
    if device.type == "cpu":
        pytest.skip("only a GPU has graphs")
    session = session_of(
        small(batch_size=512), device=str(device), precision="bf16", impl="auto", engine="auto"
    )
    assert session.learner.choice.capture
    reserved: list[int] = []
    peaks: list[int] = []
    with untouched(session) as put_back:
        for choice in candidates(ENGINES, "channels_last", [True, False]):
            torch.cuda.reset_peak_memory_stats(device)
            assert time_here(session, choice, None).step_ms
            peaks.append(torch.cuda.max_memory_reserved(device))
            put_back()
            reserved.append(torch.cuda.memory_reserved(device))
    # The first one leaves momenta's blocks and the libraries' workspaces.
    assert max(reserved) - reserved[0] < (peaks[0] - reserved[0]) / 4


def test_a_run_whose_step_waits_for_the_device_goes_on_eagerly(
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if device.type == "cpu":
        pytest.skip("only a GPU has graphs")
    failing(monkeypatch, "loop", waits_in_a_capture)
    how = {"device": str(device), "engine": "loop", "quiet": True, "max_steps": 8}
    run = fastokd.train(small(batch_size=64), out=tmp_path / "run", **how)
    assert run.last["step"] == 8
    assert run.last["train"]["loss"] > 0
    assert capsys.readouterr().err.count("the run continues eagerly") == 1
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["capture"] is False


def test_a_capture_that_fails_for_every_engine_is_refused(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_capture_of(device, monkeypatch, "loop", "grouped", "vmap")
    with pytest.raises(UserError, match="--capture is asked for, but no engine can"):
        tune(bf16_session(device), LONG)
    assert draw(device).isfinite().all()
