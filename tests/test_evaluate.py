"""Evaluations of a run whose steps are captured are captured, too, and score the same."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastokd.benchmark.loops import OurLoop
from fastokd.data import BatchStream
from fastokd.errors import UserError
from fastokd.evaluate import Evaluator, Scorer, evaluation_stream
from fastokd.learner.captured import CapturedStep
from fastokd.learner.step import step
from fastokd.recipe.names import recipe
from fastokd.run.build import build
from fastokd.run.options import RunOptions
from fastokd.run.session import Session
from tests.learner import fake_cuda
from tests.learner.every_method import ONCE, small
from tests.learner.fake_cuda import CUDA, Dispatched, fake_autocast
from tests.learner.test_sync_free import WAITS, NoWaits

QUICK: dict[str, Any] = {"quiet": True, "precision": "fp32", "engine": "loop", "device": "cpu"}


class Graphs:
    """Stands for CUDA graphs: counts each one's replays, and runs its body in them alone."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def __call__(self, body: Callable[[], Any]) -> tuple[None, Callable[[], None]]:
        place = len(self.replays)
        self.replays.append(0)

        def replay() -> None:
            assert body() is None
            self.replays[place] += 1

        return None, replay


def begun(**changes: Any) -> Session:
    one = recipe("okddip-branch@2/resnet8/digits", epochs=3, batch_size=50, **changes)
    return build(one, RunOptions(**QUICK))


def take(session: Session) -> None:
    assert isinstance(session.stream, BatchStream)
    session.begin_epoch()
    images_BHWC, labels_B = session.stream.batch(0, session.step % 2)
    session.begin_step(len(labels_B))
    step(session.learner, images_BHWC, labels_B)
    session.step += 1


@pytest.fixture(autouse=True)
def _batches_of_30(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits have batches of several sizes then."""
    monkeypatch.setattr(importlib.import_module("fastokd.evaluate"), "EVAL_BATCH", 30)


def test_captured_evaluations_score_as_eager_ones_while_the_weights_change() -> None:
    session, graphs = begun(ema=0.5), Graphs()
    captured = Evaluator(session)
    splits = (session.data.val, session.data.test)
    streams = [evaluation_stream(split) for split in splits if split is not None]
    sizes = Counter(len(labels_B) for stream in streams for _, labels_B in stream.batches(0))
    assert len(sizes) > 1
    seen = []
    session.learner.captured = CapturedStep(step, session.learner.device, graphs)
    for evaluation in range(3):
        for _ in range(3):
            take(session)
        seen.append(captured()["test"])
        training, session.learner.captured = session.learner.captured, None
        assert seen[-1] == Evaluator(session)()["test"]
        session.learner.captured = training
        # The first batch of each size is eager; the cohort has its graphs, and the average.
        wanted = [count * (evaluation + 1) - 1 for count in sizes.values()]
        assert sorted(graphs.replays) == sorted(2 * [replays for replays in wanted if replays > 0])
    assert len({str(one) for one in seen}) == 3
    assert len({(one["ema_top1"], one["ema_top5"]) for one in seen}) == 3


def test_another_choice_drops_the_graphs() -> None:
    session, graphs = begun(), Graphs()
    evaluator = Evaluator(session)
    session.learner.captured = CapturedStep(step, session.learner.device, graphs)
    evaluator()
    replays = sum(graphs.replays)
    assert replays > 0
    session.learner.adopt(session.learner.choice)
    evaluator()
    assert sum(graphs.replays) == replays
    again = Graphs()
    session.learner.captured = CapturedStep(step, session.learner.device, again)
    evaluator()
    assert (sum(graphs.replays), sum(again.replays)) == (replays, replays)


class Graph:
    """Stands for a captured step."""


def test_what_cannot_be_captured_is_evaluated_eagerly(capsys: pytest.CaptureFixture[str]) -> None:
    session = begun()

    def refuse(body: Callable[[], Any]) -> Any:
        raise UserError("the step can't be captured as a CUDA graph (why)")

    session.learner.captured = CapturedStep(step, session.learner.device, refuse)
    # The training graphs: their random state and their memory are let go.
    training = session.learner.captured.graphs
    training["a shape"] = Graph()  # type: ignore[index, assignment]
    evaluator = Evaluator(session)
    found = [evaluator(), evaluator()]
    assert session.learner.captured.graphs == {"a shape": None}
    session.learner.captured = None
    assert found == [Evaluator(session)()] * 2
    warned = capsys.readouterr().err.splitlines()
    assert warned == [
        "warning: evaluations aren't captured as CUDA graphs: the step can't be captured as a CUDA "
        "graph (why)"
    ]


@pytest.mark.parametrize(("method", "sharing"), ONCE)
def test_a_batch_reads_nothing_back(method: str, sharing: str) -> None:
    session = OurLoop(small(method, sharing), RunOptions(**{**QUICK, "precision": "bf16"})).session
    learner = session.learner
    scorer = Scorer(learner.cohort, learner.method, session.recipe.has_leader, learner.autocast)
    learner.train(False)
    images_BHWC = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8)
    labels_B: Tensor = torch.arange(6)
    with torch.no_grad():
        for _ in range(2):
            with NoWaits() as watch:
                scorer.add(images_BHWC, labels_B)
            assert watch.ops > 50


@pytest.mark.parametrize(("method", "sharing"), ONCE)
def test_a_batch_on_a_gpu_copies_nothing_of_the_host(method: str, sharing: str) -> None:
    """As a capture requires. What is made on the host stays there (``Progress.start``)."""
    how = RunOptions(**{**QUICK, "precision": "bf16"})
    session = OurLoop(small(method, sharing, ema=0.9), how).session
    learner = session.learner
    with FakeTensorMode(), fake_autocast(), torch.no_grad():
        fake_cuda._move(session)
        scorer = Scorer(learner.cohort, learner.method, session.recipe.has_leader, fake_autocast)
        learner.train(False)
        images_BHWC = torch.empty(6, 32, 32, 3, dtype=torch.uint8, device=CUDA)
        labels_B = torch.empty(6, dtype=torch.long, device=CUDA)
        with Dispatched() as seen:
            scorer.add(images_BHWC, labels_B)
    assert seen.ops["convolution"] > 0
    assert seen.ops.keys().isdisjoint(WAITS)
    assert seen.on_the_host <= {"zeros", "full"}
