"""What the tests of ``engine="auto"`` share: a small run, a clock of their own, stand-ins."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastokd.cohort import Choice
from fastokd.cohort.grouped import GroupedStudents
from fastokd.cohort.loop import LoopStudents
from fastokd.cohort.vmapped import VmapStudents
from fastokd.learner import learner as learner_module
from fastokd.learner import step as step_module
from fastokd.learner.captured import CapturedStep
from fastokd.learner.learner import Learner
from fastokd.recipe.names import Recipe, recipe
from fastokd.run import allowance, trial, tuning
from fastokd.run import build as build_module
from fastokd.run.build import build
from fastokd.run.options import RunOptions
from fastokd.run.session import Session

AUTO: dict[str, Any] = {
    "quiet": True,
    "device": "cpu",
    "precision": "fp32",
    "impl": "torch",
}
# Three candidates, none compiled.
EAGER: dict[str, Any] = {**AUTO, "memory_format": "channels_last", "compile": False}
ENGINES: dict[str, type] = {
    "loop": LoopStudents,
    "grouped": GroupedStudents,
    "vmap": VmapStudents,
}
# Enough to measure eager candidates, and compiled ones.
LONG = 10_000
# Steps before a stand-in for a capture.
WARM_UP = 2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where timings are kept in place of the user's cache."""
    monkeypatch.setattr(tuning, "cache_root", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def small(**changes: object) -> Recipe:
    return recipe(
        "okddip-branch/resnet8/digits",
        **{"epochs": 2, "students": 2, "batch_size": 8, "ema": 0.9, **changes},
    )


def session_of(one: Recipe | None = None, **options: Any) -> Session:
    return build(one or small(), RunOptions(**{**EAGER, **options}))


def fingerprint(session: Session) -> str:
    """A digest of everything that a step could move."""
    tensors, facts = session.state()
    digest = hashlib.sha256(repr(facts).encode())
    for key, value in sorted(tensors.items()):
        digest.update(key.encode() + repr((value.shape, value.stride())).encode())
        digest.update(value.contiguous().cpu().numpy().tobytes())
    grads = [p.grad is None for p in session.learner.parameters()]
    where = [
        str(session.learner.choice),
        session.learner.cohort.training,
        session.learner.cohort.engine,
    ]
    return digest.hexdigest() + repr((grads, where))


def slowed(monkeypatch: pytest.MonkeyPatch, *slow: type) -> list[float]:
    """A clock that only the engines move: by 1 s in a call of a slow one, else by 0.1 s; its time."""
    now = [0.0]
    for module in (allowance, trial):
        monkeypatch.setattr(module, "clock", lambda: now[0])
    for engine in ENGINES.values():
        call: Callable[..., Any] = engine.__call__  # type: ignore[operator]
        seconds = 1.0 if engine in slow else 0.1

        def timed(
            self: Any, x: Any, call: Callable[..., Any] = call, seconds: float = seconds
        ) -> Any:
            now[0] += seconds
            return call(self, x)

        monkeypatch.setattr(engine, "__call__", timed)
    return now


def failing(
    monkeypatch: pytest.MonkeyPatch, engine: str, act: Callable[[], object], after: int = 0
) -> list[int]:
    """Has ``engine`` act in each forward but the first ``after``; how many there were."""
    call: Callable[..., Any] = ENGINES[engine].__call__  # type: ignore[operator]
    calls: list[int] = []

    def acting(self: Any, x: Any) -> Any:
        calls.append(len(calls))
        out = call(self, x)
        if len(calls) > after:
            act()
        return out

    monkeypatch.setattr(ENGINES[engine], "__call__", acting)
    return calls


def raising(error: BaseException) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


def recorded(monkeypatch: pytest.MonkeyPatch, refused: dict[str, Exception] | None = None) -> None:
    """Has a CPU capture: the body runs in replays. A recording of an engine in ``refused`` fails,
    after it has drawn a random number and run the step."""

    def record(learner: Learner, body: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        error = (refused or {}).get(learner.choice.engine)
        if error is not None:
            torch.rand(3)
            body()
            raise error
        kept: list[Any] = []

        def replay() -> None:
            kept[:] = body()

        return kept, replay

    def captured(body: Any, device: torch.device, warm_up: int) -> CapturedStep:
        (learner,) = body.args
        return CapturedStep(body, device, partial(record, learner), warm_up)

    monkeypatch.setattr(step_module, "CapturedStep", captured)
    for module in (learner_module, build_module):
        monkeypatch.setattr(module, "check_captures", lambda device: None)
    for module in (learner_module, trial):
        monkeypatch.setattr(module, "WARM_UP_ALONE", WARM_UP)


def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """``torch.compile`` that compiles nothing; the list grows with each of its calls."""
    calls: list[Any] = []

    def stand_in(body: Callable[..., Any], **how: Any) -> Callable[..., Any]:
        def compiled(*arguments: Tensor) -> Any:
            calls.append(body)
            return body(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", stand_in)
    return calls
