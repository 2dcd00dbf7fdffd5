"""What happens between two epochs: captured evaluations, and a checkpoint's copies in pinned memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fastokd
from fastokd.data import BatchStream
from fastokd.evaluate import Evaluator
from fastokd.learner.captured import CapturedStep
from fastokd.learner.step import step
from fastokd.recipe.names import recipe
from fastokd.run.build import build
from fastokd.run.folder import RunFolder
from fastokd.run.options import RunOptions
from fastokd.run.writer import HostCopies
from tests.data.make import write_cifar
from tests.test_evaluate import Graphs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("all_digits")]


@pytest.mark.parametrize("name", ["okddip-branch@3", "ffsd@3", "one@3"])
def test_captured_evaluations_score_as_eager_ones(device: torch.device, name: str) -> None:
    """Three epochs' evaluations, between which the weights, the statistics and the average change."""
    one = recipe(f"{name}/resnet8/digits", epochs=3, batch_size=250, ema=0.5)
    session = build(one, RunOptions(quiet=True, engine="loop", device=str(device)))
    learner = session.learner
    assert isinstance(session.stream, BatchStream)
    record = None if device.type == "cuda" else Graphs()
    training, evaluator = CapturedStep(step, device, record), Evaluator(session)
    for number in range(3):
        images_BHWC, labels_B = session.stream.batch(0, number % 2)
        session.begin_epoch()
        session.begin_step(len(labels_B))
        learner.train()
        step(learner, images_BHWC, labels_B)
        learner.captured = training
        ours = evaluator()
        learner.captured = None
        theirs = Evaluator(session)()
        assert ours.keys() == theirs.keys()
        for split, metrics in theirs.items():
            for metric, value in metrics.items():
                if value is not None:
                    pair = [torch.tensor(x) for x in (ours[split][metric], value)]
                    torch.testing.assert_close(*pair, rtol=0, atol=0.02)
        learner.captured = training
        evaluator()
    graphs = evaluator._whole._run.graphs  # type: ignore[union-attr]
    assert all(graph is not None for graph in graphs.values())


def test_copies_are_of_the_moment_when_they_were_queued(device: torch.device) -> None:
    """The device is still at work then, and goes on to change the tensors."""
    tensors = {
        "weight": torch.zeros(64, 32, 3, 3, device=device).to(memory_format=torch.channels_last),
        "large": torch.zeros(1 << 22, device=device),
        "count": torch.zeros((), dtype=torch.int64, device=device),
        "host": torch.zeros(5, dtype=torch.uint8),
    }
    copies = HostCopies()
    for value in range(1, 4):
        for tensor in tensors.values():
            for _ in range(100):
                tensor.fill_(value)
        found, wait = copies.take(tensors)
        for tensor in tensors.values():
            tensor.fill_(9)
        wait()
        for name, copy in found.items():
            assert copy.device.type == "cpu"
            assert copy.is_pinned() == tensors[name].is_cuda
            assert copy.is_contiguous() or copy.stride() == tensors[name].stride()
            assert bool((copy == value).all()), name


def test_a_run_is_resumed_from_what_the_thread_wrote(device: torch.device, tmp_path: Path) -> None:
    """Saved after each step, while the next ones run: the last checkpoint is the state at the end."""
    one = recipe("okddip-branch@2/resnet8/digits", epochs=2, batch_size=250)
    how: dict[str, Any] = {"device": str(device), "engine": "loop", "quiet": True}
    run = fastokd.train(one, out=tmp_path / "run", save_every_steps=1, **how)
    again = fastokd.evaluate(run.folder, options=RunOptions(**how))
    assert again["test"]["mean_top1"] == pytest.approx(run.last["test"]["mean_top1"], abs=0.01)


def test_an_epoch_is_mostly_steps(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CIFAR-100 from end to end: steps take 85% of the time that the third and the fourth epoch take."""
    on_gpu = device.type == "cuda"
    images, held_out, batch, model = (
        (50_000, 10_000, 128, "resnet32") if on_gpu else (64, 16, 16, "resnet8")
    )
    write_cifar(tmp_path / "drawn", "cifar100", train=images, test=held_out)
    ends: list[float] = []
    record = RunFolder.record

    def recording(folder: RunFolder, session: Any, row: dict[str, Any]) -> None:
        record(folder, session, row)
        ends.append(time.perf_counter())

    monkeypatch.setattr(RunFolder, "record", recording)
    run = fastokd.train(
        recipe(f"okddip-network/{model}/cifar100", epochs=4, batch_size=batch),
        out=tmp_path / "run", data_root=tmp_path / "drawn", device=str(device), engine="loop",
        capture=on_gpu, quiet=True,
    )  # fmt: skip
    share = sum(row["seconds"] for row in run.metrics[2:]) / (ends[3] - ends[1])
    print(f"steps take {share:.0%} of an epoch")
    assert 0 < share < 1
    assert share > 0.85 or not on_gpu
