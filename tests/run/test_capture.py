"""Capture by default: which runs capture their steps, and what a capture that fails leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastokd
from fastokd.checkpoint import newest_checkpoint
from fastokd.errors import UserError
from fastokd.learner import step as step_module
from fastokd.learner.captured import CapturedStep
from fastokd.learner.learner import Learner
from fastokd.learner.recording import CaptureError
from fastokd.learner.state import state_of
from fastokd.metrics import Meter
from fastokd.recipe.names import recipe
from fastokd.report import page
from fastokd.run import build as build_module
from fastokd.run import identity
from fastokd.run.hooks import Hooks
from fastokd.run.options import RunOptions
from fastokd.train import resume, train_epoch
from tests.run.tuned import recorded

HOW: dict[str, Any] = {
    **{"device": "cpu", "precision": "fp32", "engine": "loop", "impl": "torch"},
    "quiet": True,
}


def decided(
    device: str, ranks: int = 1, rate: Any = None, recomputed: str = "", **options: Any
) -> Any:
    """What :func:`build` decides for a learner there."""
    optimizer = SimpleNamespace(param_groups=[{"lr": torch.tensor(0.1) if rate is None else rate}])
    learner: Any = SimpleNamespace(
        device=torch.device(device),
        ranks=SimpleNamespace(size=ranks),
        optimizers=[optimizer],
        cohort=SimpleNamespace(recomputes=bool(recomputed), model_names=(recomputed,)),
    )
    learner.why_not_captured = lambda: Learner.why_not_captured(learner)
    return build_module._captures(RunOptions(**options), learner)


def test_one_gpu_captures_unasked() -> None:
    assert decided("cuda:0") == (True, ())
    assert decided("cuda:0", capture=False) == (False, ())
    assert decided("cuda:0", recomputed="resnet8") == (True, ())
    assert decided("cpu") == (False, ())
    with pytest.raises(UserError, match="asked for on cpu, but only a GPU has graphs"):
        decided("cpu", capture=True)


@pytest.mark.parametrize(
    ("how", "note"),
    [
        ({"ranks": 2}, "several ranks capture only with --capture"),
        ({"deterministic": True}, "--deterministic then holds after a resume"),
        ({"rate": 0.1}, "its optimizer reads the learning rate on the host"),
        ({"recomputed": "timm:test_vit"}, "to recompute the blocks of another library's network"),
    ],
)
def test_what_is_not_captured_says_why(how: dict[str, Any], note: str) -> None:
    captures, notes = decided("cuda:0", **how)
    assert not captures
    assert len(notes) == 1
    assert notes[0].startswith("the steps run eagerly, not as a CUDA graph: ")
    assert note in notes[0]
    if how.keys() & {"rate", "recomputed"}:
        with pytest.raises(UserError, match=rf"capture is asked for, but {note}.*leave --capture"):
            decided("cuda:0", capture=True, **how)
    else:
        assert decided("cuda:0", capture=True, **how) == (True, ())


@pytest.mark.parametrize(
    ("begun", "here", "there", "stays"),
    [
        ({"capture": True, "ranks": 1}, 1, None, True),
        ({"capture": True, "ranks": 1}, 2, None, False),  # one rank captures unasked
        ({"capture": True, "ranks": 2}, 2, None, True),
        ({"capture": True}, 2, None, True),  # an older run: it was asked for
        ({"capture": False, "ranks": 1}, 1, False, False),
        ({}, 1, None, False),
    ],
)
def test_more_ranks_resume_a_captured_run_eagerly(
    begun: dict[str, Any],
    here: int,
    there: bool | None,
    stays: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(identity, "launched", lambda: here)
    assert identity.stays_captured(begun) == stays
    (tmp_path / "environment.json").write_text(json.dumps(begun))
    found = identity.begun_with(tmp_path, RunOptions())
    resumed = RunOptions().as_begun(found, tmp_path)
    assert resumed.capture == (True if stays else there)


class Recorder:
    """Stands for captures: the body runs in replays. Capture number ``fails`` computes nothing, and its
    Python code ends at ``place``: in the ``forward``, between unscaling and the next ``scale``, in the
    ``update``, or at the ``end`` of the step.
    """

    def __init__(self, place: str, fails: int) -> None:
        self.place, self.fails, self.captures = place, fails, 0

    def captured(self, body: Any, device: torch.device, warm_up: int) -> CapturedStep:
        (learner,) = body.args
        meter = body.func.__self__.meter
        return CapturedStep(body, device, lambda step: self.record(learner, meter, step), warm_up)

    def record(
        self, learner: Learner, meter: Meter, body: Callable[[], Any]
    ) -> tuple[Any, Callable[[], None]]:
        self.captures += 1
        if self.captures - 1 == self.fails:
            with nothing_computed(learner, meter):
                torch.rand(3)
                with self.failing(learner):
                    body()
        kept: list[Any] = []

        def replay() -> None:
            kept[:] = body()

        return kept, replay

    @contextmanager
    def failing(self, learner: Learner) -> Iterator[None]:
        error = RuntimeError("operation not permitted when stream is capturing")
        places: dict[str, tuple[Any, str]] = {
            "forward": (learner.method, "forward"),
            "scale": (learner.scaler, "update"),
            "update": (step_module, "step_unless"),
        }
        try:
            if self.place == "end":
                yield
            else:
                with mock.patch.object(*places[self.place], side_effect=error):
                    yield
            raise error
        except RuntimeError as cause:
            raise CaptureError("the step can't be captured") from cause


@contextmanager
def nothing_computed(learner: Learner, meter: Meter) -> Iterator[None]:
    """Restores every tensor's value at the end; what Python holds stays."""
    tensors = [x for name, x in state_of(learner)[0].items() if not name.startswith("rng.")]
    tensors += meter.totals.values()
    guard, scaler = learner.guard, learner.scaler
    tensors += [guard.fault, guard._taken]
    if scaler.is_enabled():
        tensors += [x for x in (scaler._scale, scaler._growth_tracker) if x is not None]
    before = [x.detach().clone() for x in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for x, was in zip(tensors, before, strict=True):
                x.copy_(was)


def trained(out: Path, name: str = "okddip-branch", **how: Any) -> dict[str, Tensor]:
    """Two epochs of 150, 150, 150 and 50 images; the tensors of the last checkpoint."""
    one = recipe(f"{name}/resnet8/digits", epochs=2, batch_size=30, students=3, ema=0.9)
    with mock.patch.object(page, "report"):  # it takes longer than the run
        fastokd.train(one, out=out, **{**HOW, **how})
    return newest_checkpoint(out / "checkpoints")[1]


@pytest.mark.parametrize(
    ("place", "fails", "name", "how"),
    [
        ("forward", 0, "okddip-branch", {"clip_norm": 1.0}),
        ("end", 0, "ffsd", {"accumulate": 2}),
        ("update", 1, "okddip-branch", {}),  # the smaller batch: in the second epoch's last step
    ],
)
def test_a_run_whose_capture_fails_goes_on_eagerly(
    place: str,
    fails: int,
    name: str,
    how: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """To the same bits as the eager run, metrics and random state included; said once, and a resumed
    run doesn't try again."""
    plain = trained(tmp_path / "eager", name, **how)
    recorded(monkeypatch)
    recorder = Recorder(place, fails)
    monkeypatch.setattr(step_module, "CapturedStep", recorder.captured)
    monkeypatch.setattr(build_module, "_captures", lambda options, learner: (True, ()))
    capsys.readouterr()
    found = trained(tmp_path / "captured", name, **how)
    assert recorder.captures == fails + 1
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert (
        "(RuntimeError: operation not permitted when stream is capturing): the run continues"
        in said
    )
    assert found.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=key)
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("eager", "captured")
    ]
    assert [row["train"] for row in lines[0]] == [row["train"] for row in lines[1]]
    environment = json.loads((tmp_path / "captured" / "environment.json").read_text())
    assert environment["capture"] is False


@pytest.mark.parametrize("place", ["scale", "end"])
def test_fp16_s_scale_is_as_if_no_capture_had_failed(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients were unscaled already, or the scale was updated."""
    one = recipe("okddip-branch/resnet8/digits", epochs=1, batch_size=8, students=2)
    options = RunOptions(**{**HOW, "precision": "fp16", "clip_norm": 1.0, "max_steps": 5})
    states = []
    for captures in (False, True):
        with monkeypatch.context() as patch:
            recorded(patch)
            patch.setattr(step_module, "CapturedStep", Recorder(place, 0).captured)
            patch.setattr(build_module, "_captures", lambda *_, c=captures: (c, ()))
            session = build_module.build(one, options)
            if captures:
                with pytest.raises(CaptureError):
                    train_epoch(session, Hooks())
                session.learner.give_up_capture()
            train_epoch(session, Hooks())
        assert session.step == 5
        states.append(session.state())
    (theirs, facts), (ours, our_facts) = states
    assert our_facts["scaler"] == facts["scaler"]
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=0, msg=key)


def test_a_capture_that_was_asked_for_and_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(monkeypatch)
    monkeypatch.setattr(step_module, "CapturedStep", Recorder("update", 0).captured)
    with pytest.raises(UserError, match="the step can't be captured"):
        trained(tmp_path / "run", capture=True)


def test_a_captured_run_is_resumed_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun unasked; where that fails now, the resumed run goes on eagerly, too."""
    recorded(monkeypatch)
    monkeypatch.setattr(build_module, "_captures", lambda options, learner: (True, ()))
    trained(tmp_path / "run", max_steps=4)
    monkeypatch.undo()
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["capture"] is True
    with pytest.raises(UserError, match="only a GPU has graphs"):
        resume(tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match=r"differs in --capture \(True there, False here\)"):
        resume(tmp_path / "run", quiet=True, capture=False)
    recorded(monkeypatch)
    recorder = Recorder("update", 0)
    monkeypatch.setattr(step_module, "CapturedStep", recorder.captured)
    resume(tmp_path / "run", quiet=True)
    assert recorder.captures == 1
    assert "the run continues eagerly" in capsys.readouterr().err


def test_warm_up_is_short_without_ddp() -> None:
    session = build_module.build(recipe("dml/resnet8/digits", batch_size=8), RunOptions(**HOW))
    assert session.learner.warm_up == 3
    session.learner.replicas = mock.Mock()
    assert session.learner.warm_up == 11
