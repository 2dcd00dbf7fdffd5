"""A captured step is the eager one, whatever changes from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastokd
from fastokd.benchmark.loops import OurLoop
from fastokd.learner.captured import WARM_UP_STEPS, CapturedStep
from fastokd.learner.step import step, training_step
from fastokd.recipe.names import Recipe, recipe
from fastokd.run import block
from fastokd.run.options import RunOptions
from fastokd.run.session import Session
from tests.learner.every_method import METHODS, Recorder, small
from tests.run import test_one_replay as one_replay

pytestmark = pytest.mark.gpu
STEPS = 30


def session_of(device: torch.device, one: Recipe, captured: bool, **options: Any) -> Session:
    """On the recipe's shapes; on a CPU the graph is a stand-in."""
    on_gpu = device.type == "cuda"
    chosen = RunOptions(
        device=str(device),
        **{"engine": "loop", "precision": "fp32", "capture": captured and on_gpu, **options},
    )
    session = OurLoop(one, chosen).session
    if captured and not on_gpu:
        learner = session.learner
        learner.choice = replace(learner.choice, capture=True)
        learner.captured = CapturedStep(partial(step, learner), device, Recorder())
    return session


def double(session: Session) -> None:
    session.learner.cohort.double()
    session.learner.method.double()


def train(
    session: Session, sizes: list[int], change: Callable[[Session], None] | None = None
) -> tuple[list[float], Tensor]:
    """Steps on drawn batches of these sizes, an epoch further every tenth of them; the losses, and
    all that is trained."""
    if change is not None:
        change(session)
    generator = torch.Generator().manual_seed(7)
    losses = []
    for index, size in enumerate(sizes):
        session.epoch = 20 * (10 * index // len(sizes))
        session.begin_epoch()
        images = torch.randint(256, (size, 32, 32, 3), dtype=torch.uint8, generator=generator)
        labels = torch.randint(10, (size,), generator=generator)
        session.begin_step(size)
        device = session.learner.device
        loss = training_step(session.learner, images.to(device), labels.to(device))[1]
        losses.append(loss.total.clone())
        session.step += 1
    return [loss.item() for loss in losses], torch.cat(
        [p.detach().flatten().double() for p in session.learner.parameters()]
    )


def graphs(session: Session) -> int:
    captured = session.learner.captured
    assert captured is not None
    return sum(graph is not None for graph in captured.graphs.values())


@pytest.mark.parametrize("engine", ["loop", "grouped", "vmap"])
def test_captured_is_eager_across_ramp_and_rate(device: torch.device, engine: str) -> None:
    """In float64, 30 steps over epochs 0 to 180: the ramp ends at 80, the rate falls at 150."""
    one = small("okddip", "branch")
    assert 80 <= one.ramp_epochs <= 180
    assert any(m <= 180 for m in one.milestones)
    eager, captured = (session_of(device, one, how, engine=engine) for how in (False, True))
    theirs, theirs_end = train(eager, [6] * STEPS, double)
    ours, ours_end = train(captured, [6] * STEPS, double)
    assert graphs(captured) == 1
    assert ours == pytest.approx(theirs, rel=1e-7)
    torch.testing.assert_close(ours_end, theirs_end, rtol=1e-6, atol=1e-8)
    moved = torch.linalg.vector_norm(theirs_end - train_start(device, one))
    assert moved > 1e-2


def train_start(device: torch.device, one: Recipe) -> Tensor:
    session = session_of(device, one, False)
    return torch.cat([p.detach().flatten().double() for p in session.learner.parameters()])


@pytest.mark.parametrize(
    ("method", "sharing"),
    [("okddip", "network"), ("okddip_random", "branch"), ("ffsd", "network"), ("kdcl", "network")],
)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_captured_with_fused_losses(
    device: torch.device, method: str, sharing: str, precision: str, accumulate: int
) -> None:
    """Low precision, clipping, an average, parts: the losses of the eager steps, but for rounding."""
    one = small(method, sharing, batch_size=16, lr=0.01, ema=0.9)
    options: dict[str, Any] = {"precision": precision, "clip_norm": 5.0}
    options["accumulate"] = accumulate
    eager, captured = (session_of(device, one, how, **options) for how in (False, True))
    theirs, _ = train(eager, [16] * (WARM_UP_STEPS + 9))
    ours, _ = train(captured, [16] * (WARM_UP_STEPS + 9))
    assert graphs(captured) == 1
    assert eager.learner.guard.read() is None
    assert captured.learner.guard.read() is None
    assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize("engine", ["loop", "grouped"])
def test_captured_with_recomputed_activations(device: torch.device, engine: str) -> None:
    """A replay's backward runs the students' forward again: the steps of a run that keeps activations."""
    one = small("okddip", "branch")
    sizes = [6] * (WARM_UP_STEPS + 3)
    plain = session_of(device, one, False, engine=engine)
    captured = session_of(device, one, True, engine=engine, checkpoint_activations=True)
    assert captured.learner.cohort.recomputes
    theirs, theirs_end = train(plain, sizes, double)
    ours, ours_end = train(captured, sizes, double)
    assert graphs(captured) == 1
    assert ours == pytest.approx(theirs, rel=1e-7)
    torch.testing.assert_close(ours_end, theirs_end, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("method", "sharing"), METHODS)
def test_every_method_is_captured_unasked(device: torch.device, method: str, sharing: str) -> None:
    """With all that a recipe may have: a step that can't be captured raises."""
    options = RunOptions(device=str(device), precision="fp16", accumulate=2, clip_norm=5.0)
    session = OurLoop(small(method, sharing, batch_size=16, ema=0.9), options).session
    assert session.learner.choice.capture == (device.type == "cuda")
    losses, _ = train(session, [16] * 6)
    assert all(math.isfinite(loss) for loss in losses)
    if device.type == "cuda":
        assert graphs(session) == 1


def test_a_ragged_batch_has_a_graph_of_its_own(device: torch.device) -> None:
    """The smaller batch comes first, between, and last."""
    sizes = [5, *[8] * (WARM_UP_STEPS + 2), 5, 8, 8, 5, 8]
    one = small("okddip_random", "network", batch_size=8)
    eager, captured = (session_of(device, one, how) for how in (False, True))
    theirs, theirs_end = train(eager, sizes, double)
    ours, ours_end = train(captured, sizes, double)
    assert graphs(captured) == 2
    assert ours == pytest.approx(theirs, rel=1e-7)
    torch.testing.assert_close(ours_end, theirs_end, rtol=1e-6, atol=1e-8)


def test_a_nan_in_a_replay_changes_nothing(device: torch.device) -> None:
    session = session_of(device, small("dml", "network"), True, precision="bf16")
    train(session, [6] * (WARM_UP_STEPS + 3))
    weight = next(iter(session.learner.cohort.parameters()))
    with torch.no_grad():
        weight[(0,) * weight.dim()] = float("nan")
    before = {k: v.clone() for k, v in session.state()[0].items() if not k.startswith("rng")}
    session.begin_step(6)
    images = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8, device=device)
    labels = torch.zeros(6, dtype=torch.long, device=device)
    training_step(session.learner, images, labels)
    assert session.learner.guard.fault == 1
    for key, value in session.state()[0].items():
        if key in before:
            torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def test_a_captured_step_is_one_replay(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop in float64: the metrics and weights of the eager one, and no operator between two
    replays but for the first step of a block of draws."""
    monkeypatch.setattr(block, "STEPS", 4)
    one = recipe("okddip_random-branch/resnet8/digits", epochs=9, batch_size=60, students=3)
    eager, captured = (one_replay.loop_of(one, device, captured=how) for how in (False, True))
    for session in (eager, captured):
        double(session)
    theirs = one_replay.go(eager, epochs=3)
    ours = one_replay.go(captured, epochs=3)
    # Nine steps an epoch, the last one smaller.
    assert graphs(captured) == 2
    for row, wanted in zip(ours, theirs, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-7)
        assert row["student_top1"] == pytest.approx(wanted["student_top1"], abs=0.01)
    ends = [
        torch.cat([p.detach().flatten() for p in session.learner.parameters()])
        for session in (eager, captured)
    ]
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=1e-8)
    with one_replay.Outside(captured) as outside:
        one_replay.go(captured, outside, epochs=1)
    assert [number for number, step in enumerate(outside.steps[:-1]) if step] == [0, 4, 8]


def test_a_captured_run_resumes(device: torch.device, tmp_path: Path) -> None:
    """Two epochs at once, and the same two with a stop within the second: as many steps, and the
    same losses but for rounding."""
    one = recipe("okddip-branch/resnet8/digits", epochs=2, batch_size=64, students=2, lr=0.01)
    how: dict[str, Any] = {
        "device": str(device),
        "engine": "loop",
        "capture": device.type == "cuda",
        "precision": "fp32",
        "quiet": True,
    }
    whole = fastokd.train(one, out=tmp_path / "whole", **how)
    steps = whole.last["step"]
    fastokd.train(one, out=tmp_path / "parts", max_steps=3 * steps // 4, **how)
    parts = fastokd.train(one, out=tmp_path / "parts", resume=True, **how)
    assert parts.last["step"] == steps
    assert parts.last["train"]["loss"] == pytest.approx(whole.last["train"]["loss"], rel=0.02)
