"""A capture that fails leaves stream, allocator and generator as a next step needs them.

There is no GPU: what is called is watched. ``tests/gpu/test_tuning.py`` fails real captures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastokd.errors import UserError
from fastokd.learner import captured
from fastokd.learner.captured import CapturedStep
from fastokd.learner.recording import CaptureError, recording

POOL = (0, 7)


class Generator:
    def __init__(self) -> None:
        self.state = "capturing"

    def clone_state(self) -> str:
        return f"a copy of {self.state}"

    def graphsafe_set_state(self, state: str) -> None:
        self.state = state


class Calls(list[str]):
    """What is called, in order. ``invalid``: the capture's end raises. ``closes``: as PyTorch 2.14,
    whose end closes the pool all the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, invalid: bool, closes: bool) -> None:
        super().__init__()
        self.invalid, self.open, self.closes = invalid, False, closes
        self.generator = Generator()
        before = SimpleNamespace(device=torch.device("cuda:1"), name="before")
        for owner, name, stand_in in (
            (torch.cuda, "graph", lambda graph, **how: self._graph(how)),
            (torch.cuda, "current_stream", lambda device: before),
            (torch.cuda, "set_stream", lambda stream: self.append(f"stream {stream.name}")),
            (torch.cuda, "default_generators", {1: self.generator}),
            (torch._C, "_cuda_endAllocateToPool", self._end),
            (torch._C, "_cuda_releasePool", lambda index, pool: self.append(f"let go of {pool}")),
        ):
            monkeypatch.setattr(owner, name, stand_in)

    def _graph(self, how: dict[str, Any]) -> Calls:
        assert how == {"pool": POOL, "stream": SIDE, "capture_error_mode": "thread_local"}
        return self

    def __enter__(self) -> Calls:
        self.open = True
        return self

    def __exit__(self, *error: object) -> None:
        if self.invalid:
            self.open = not self.closes
            raise torch.AcceleratorError("CUDA error: operation failed due to a previous error")
        self.open = False

    def reset(self) -> None:
        self.append("reset")

    def _end(self, index: int, pool: Any) -> None:
        if not self.open:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open = False
        self.append(f"closed {pool} of {index}")


SIDE: Any = SimpleNamespace(device=torch.device("cuda:1"))


def capture(calls: Calls, error: BaseException | None) -> None:
    graph: Any = calls
    with recording(graph, POOL, SIDE, capture_error_mode="thread_local"):
        if error is not None:
            raise error


def test_a_capture_that_succeeds_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, invalid=False, closes=False)
    capture(calls, None)
    assert calls == []
    assert calls.generator.state == "capturing"


@pytest.mark.parametrize(
    ("invalid", "closes", "ended"),
    [
        (True, False, ["closed (0, 7) of 1", "let go of (0, 7)"]),  # PyTorch 2.11
        (True, True, []),
        (False, False, []),  # the body raised, and the capture was valid
    ],
)
def test_a_capture_that_fails_is_ended(
    invalid: bool, closes: bool, ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, invalid, closes)
    error = RuntimeError("operation not permitted when stream is capturing\nfor more see")
    with pytest.raises(UserError, match=r"\(RuntimeError: operation not p.*capturing\): leave --c"):
        capture(calls, error)
    assert calls == ["stream before", "reset", *ended]
    assert calls.generator.state == "a copy of capturing"


def test_a_capture_whose_end_alone_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="previous error"):
        capture(Calls(monkeypatch, invalid=True, closes=True), None)


def test_a_capture_without_memory_is_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eager step may need less."""
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(CaptureError, match="CUDA out of memory") as raised:
        capture(Calls(monkeypatch, invalid=True, closes=False), error)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt()])
def test_other_errors_are_raised_unchanged(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, invalid=True, closes=False)
    with pytest.raises(type(error)) as raised:
        capture(calls, error)
    assert raised.value is error
    assert calls[:2] == ["stream before", "reset"]


class Stream:
    """A stream that notes what it waits for."""

    def __init__(self, device: object = None) -> None:
        self.device = device
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


def test_eager_steps_and_captures_share_one_stream_and_one_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The eager steps of a smaller batch too, before and after captures. A loader's threads may
    allocate during a capture."""
    current, eager, recorded = Stream(), [], []

    @contextmanager
    def beside(stream: Stream) -> Iterator[None]:
        assert stream.waited[-1] is current
        eager.append(stream)
        yield

    @contextmanager
    def noted(graph: Any, pool: Any, stream: Stream, **how: Any) -> Iterator[None]:
        recorded.append((pool, stream, how))
        yield

    for owner, name, stand_in in (
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "current_stream", lambda device: current),
        (torch.cuda, "stream", beside),
        (torch.cuda, "graph_pool_handle", lambda: POOL),
        (torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None)),
        (captured, "recording", noted),
    ):
        monkeypatch.setattr(owner, name, stand_in)
    step = CapturedStep(lambda images, labels: images.sum(), torch.device("cuda"), warm_up=2)
    for size in (4, 4, 4, 3, 4, 3):
        step(torch.zeros(size), torch.zeros(size))
    side: Any = step.stream
    assert eager == [side] * 3
    assert current.waited == eager
    assert recorded == [(POOL, side, {"capture_error_mode": "thread_local"})] * 2
