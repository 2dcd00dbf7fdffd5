"""A step from its draws to its metrics: captured it is one replay, and its numbers are the eager ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastokd.data import BatchStream
from fastokd.errors import UserError
from fastokd.learner.captured import CapturedStep
from fastokd.methods import MethodLoss
from fastokd.recipe.names import Recipe, recipe
from fastokd.run import block
from fastokd.run.block import Block
from fastokd.run.build import build
from fastokd.run.hooks import Hook, Hooks
from fastokd.run.interruption import Keeper, StopRequest
from fastokd.run.nonfinite import settle
from fastokd.run.options import RunOptions
from fastokd.run.session import Session
from fastokd.seeds import keyed_generator
from fastokd.train import train_epoch
from tests.learner.every_method import Recorder

WARM_UP = 2
# Five steps an epoch: four of 24 images and one of 4.
SIZES = [24, 24, 24, 24, 4]


class Replays(Recorder):
    """Stand-ins for graphs that know when one of them is replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.running = False

    def __call__(self, body: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        result, replay = super().__call__(body)

        def running() -> None:
            self.running = True
            replay()
            self.running = False

        return result, running


def session_of(*, captured: bool, **options: Any) -> Session:
    one = recipe("okddip_random-branch/resnet8/digits", epochs=6, students=3, batch_size=24)
    session = loop_of(one, torch.device("cpu"), captured=captured, **options)
    if isinstance(session.stream, BatchStream):
        assert [session.stream.size(index) for index in range(len(session.stream))] == SIZES
    return session


def loop_of(one: Recipe, device: torch.device, *, captured: bool, **options: Any) -> Session:
    """A run of ``one``; on a CPU its graphs are stand-ins."""
    on_gpu = device.type == "cuda"
    plain = {"quiet": True, "precision": "fp32", "engine": "loop", "impl": "torch"}
    how = {"device": str(device), "capture": captured and on_gpu, **plain, **options}
    session = build(one, RunOptions(**how))
    if captured and not on_gpu:
        learner = session.learner
        learner.choice = replace(learner.choice, capture=True)
        body = partial(session.whole_step, learner)
        learner.captured = CapturedStep(body, learner.device, Replays(), WARM_UP)
    return session


def go(session: Session, *hooks: Hook, epochs: int = 2) -> list[dict[str, Any]]:
    """Epochs of the loop; their metrics."""
    all_hooks = Hooks()
    all_hooks.add(*hooks)
    rows = []
    for _ in range(epochs):
        rows.append(train_epoch(session, all_hooks))
        if not session.stopped:
            session.finish_epoch()
    return rows


def same(one: Session, other: Session) -> None:
    ours, theirs = (session.state() for session in (one, other))
    assert {**ours[1], "how": 0} == {**theirs[1], "how": 0}
    assert ours[0].keys() == theirs[0].keys()
    for name, value in ours[0].items():
        assert torch.equal(value, theirs[0][name]), name


def replays(session: Session) -> list[int]:
    assert session.learner.captured is not None
    recorder = session.learner.captured.record
    assert isinstance(recorder, Replays)
    return recorder.replays


@pytest.mark.parametrize(("rows", "accumulate"), [(1, 1), (3, 1), (64, 3)])
def test_a_captured_run_has_the_eager_runs_bits(
    rows: int, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks that end within the epoch, with it, and after each step."""
    eager = session_of(captured=False, accumulate=accumulate)
    theirs = go(eager)
    monkeypatch.setattr(block, "STEPS", rows)
    captured = session_of(captured=True, accumulate=accumulate)
    assert go(captured) == theirs
    # The first smaller batch is eager, and the graphs make room for it.
    assert replays(captured) == [4 - WARM_UP, 4, 1]
    same(captured, eager)


@pytest.mark.parametrize("overfit_batch", [False, True])
def test_a_run_stopped_within_an_epoch_goes_on_with_the_same_bits(overfit_batch: bool) -> None:
    """Also where the stream gives batches and not their rows."""
    whole = session_of(captured=True, overfit_batch=overfit_batch)
    rows = go(whole)
    begun = session_of(captured=True, overfit_batch=overfit_batch, max_steps=7)
    go(begun)
    assert (begun.epoch, begun.batch, begun.step) == (1, 2, 7)
    resumed = session_of(captured=True, overfit_batch=overfit_batch)
    resumed.load_state(*begun.state())
    assert go(resumed, epochs=1) == rows[1:]
    same(resumed, whole)


def test_a_position_that_moves_back_takes_its_draws_along(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 6 isn't finite, which is read after step 7: 6 is skipped, 7 is repeated, within a block."""
    monkeypatch.setattr("fastokd.run.interruption.READ_EVERY", 3)
    found = []
    for captured in (False, True):
        session = session_of(captured=captured, skip_nonfinite=1)

        def bad(
            _module: Any, _args: Any, loss: MethodLoss, session: Session = session
        ) -> MethodLoss:
            factor = float("nan") if session.step == 6 else 1.0
            return MethodLoss(loss.total * factor, loss.parts)

        def drawn(_module: Any, args: tuple[Tensor], session: Session = session) -> None:
            (images_BHWC,), generator = args, keyed_generator(0, "draws", session.step)
            belief_BPP = session.learner.method.draw(len(images_BHWC), generator)["belief_BPP"]
            assert torch.equal(session.learner.progress.draws["belief_BPP"], belief_BPP)
            assert torch.equal(images_BHWC, session.next_batch()[0])

        session.learner.method.register_forward_hook(bad)
        session.learner.cohort.register_forward_pre_hook(drawn)

        def check(session: Session = session) -> None:
            settle(session, lambda: None)

        keeper = Keeper(lambda: None, StopRequest(), None, None, settle=check)
        found.append((session, go(session, keeper)))
        assert capsys.readouterr().err.startswith("warning: step 6 (epoch 1, batch 1")
        assert (session.step, session.skipped) == (10, 1)
    (eager, theirs), (graphs, ours) = found
    assert ours == theirs
    same(graphs, eager)


class Outside(TorchDispatchMode, Hook):
    """The operators that each step dispatches outside of replays."""

    optional = False

    def __init__(self, session: Session) -> None:
        super().__init__()
        assert session.learner.captured is not None
        self.recorder = session.learner.captured.record
        self.steps: list[Counter[str]] = [Counter()]

    def on_step(self, images: int) -> None:
        self.steps.append(Counter())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (isinstance(self.recorder, Replays) and self.recorder.running):
            self.steps[-1][func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_between_two_replays_the_host_dispatches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the first step of a block, which is uploaded in one copy a kind of draw."""
    monkeypatch.setattr(block, "STEPS", 3)
    session = session_of(captured=True)
    go(session)
    with Outside(session) as outside:
        go(session, outside, epochs=1)
    # Three and one of 24 images, one of 4, and the epoch's end.
    uploads = [number for number, step in enumerate(outside.steps[:-1]) if step]
    assert uploads == [0, 3, 4]
    assert outside.steps[1] == outside.steps[2] == Counter()
    for number in uploads[1:]:
        # The batches' rows and the method's draws; the counter goes back to 0.
        assert outside.steps[number]["copy_"] == 2
        assert outside.steps[number]["zero_"] == 1
        assert outside.steps[number]["stack"] >= 2
        assert outside.steps[number]["index_select"] == 0


def test_no_step_is_drawn_that_is_not_taken() -> None:
    session = session_of(captured=False, max_steps=7)
    drawn: list[int] = []
    draw = session.learner.method.draw

    def counted(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        drawn.append(batch)
        return draw(batch, generator)

    session.learner.method.draw = counted  # type: ignore[method-assign]
    go(session)
    assert drawn == [*SIZES, 24, 24]


def test_a_block_stays_in_its_memory_and_reads_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "BYTES", 100)
    one = Block(torch.device("cpu"))
    draws = [{"x_3": torch.full((3,), float(i)), "y": torch.tensor(i)} for i in range(12)]
    left = iter(draws)
    assert one.fill(left) == one.steps == 5  # 20 bytes a step
    kept = dict(one.tensors)
    seen = [one.read() for _ in range(2)]
    assert one.fill(left) == 5  # from here on, whatever was read
    seen += [one.read() for _ in range(5)]
    assert one.fill(left) == 2
    seen += [one.read() for _ in range(2)]
    assert all(one.tensors[name] is value for name, value in kept.items())
    wanted = [*draws[:2], *draws[5:10], *draws[10:]]
    for got, want in zip(seen, wanted, strict=True):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert Block(torch.device("cpu")).fill(iter([{}] * 3)) == 3
    large = Block(torch.device("cpu"))
    assert large.fill(iter([{"x": torch.zeros(200)}] * 3)) == 1


def test_a_step_too_large_says_what_fits_without_a_batch_at_hand() -> None:
    session = session_of(captured=False)

    def refuse(_module: Any, images: tuple[Tensor, ...]) -> None:
        if len(images[0]) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    session.learner.cohort.register_forward_pre_hook(refuse)
    with pytest.raises(UserError, match=r"a step of 24 images .* 6 would fit"):
        go(session)
