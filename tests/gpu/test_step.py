"""A bf16 step of every method on the device: it never waits, and it learns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastokd.benchmark.loops import OurLoop
from fastokd.learner.step import training_step
from fastokd.run.options import RunOptions
from tests.learner.every_method import METHODS, small

pytestmark = pytest.mark.gpu


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """An operation that makes the host wait for the device raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def loop_of(device: torch.device, method: str, sharing: str, **options: Any) -> OurLoop:
    chosen = {"precision": "bf16", "engine": "loop", **options}
    return OurLoop(small(method, sharing, ema=0.9), RunOptions(device=str(device), **chosen))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(("method", "sharing"), METHODS)
def test_a_bf16_step_never_waits(device: torch.device, method: str, sharing: str) -> None:
    loop = loop_of(device, method, sharing, clip_norm=1.0)
    session = loop.session
    before = [p.detach().clone() for p in session.learner.parameters()]
    loop.step()  # kernels are compiled, momenta made
    with no_waiting(device):
        session.begin_step(len(loop.labels_B))
        logits_SBC, loss = training_step(session.learner, loop.images_BHWC, loop.labels_B)
        losses = {"loss": loss.total, **loss.parts}
        session.meter.update(logits_SBC, loop.labels_B, losses, session.learner.guard.fault)
    assert loss.total.isfinite()
    assert session.learner.guard.fault == 0
    moved = [
        not torch.equal(p, was) for p, was in zip(session.learner.parameters(), before, strict=True)
    ]
    assert sum(moved) > 0.9 * len(moved)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("precision", ["fp16", "fp32", "tf32"])
def test_other_precisions_never_wait(device: torch.device, precision: str) -> None:
    if device.type == "cpu" and precision == "tf32":
        pytest.skip("only a GPU has tf32")
    loop = loop_of(device, "okddip", "branch", precision=precision)
    loop.step()
    with no_waiting(device):
        loop.step()
    assert loop.step().isfinite()


@pytest.mark.parametrize("engine", ["loop", "grouped", "vmap"])
def test_the_guard_finds_a_nan_in_bf16(device: torch.device, engine: str) -> None:
    loop = loop_of(device, "okddip", "network", engine=engine)
    loop.step()
    session = loop.session
    state = {k: v.clone() for k, v in session.state()[0].items() if not k.startswith("rng")}
    images_BCHW = loop.images_BHWC.permute(0, 3, 1, 2).float() / 255
    images_BCHW[2, 1, 5, 5] = float("nan")
    session.begin_step(len(loop.labels_B))
    training_step(session.learner, images_BCHW, loop.labels_B)
    assert session.learner.guard.fault == 1
    for key, value in state.items():
        assert torch.equal(session.state()[0][key], value), key
