"""The engines on the device, and the fused losses within a step: the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastokd.benchmark.loops import OurLoop
from fastokd.learner.step import gradients
from fastokd.run.options import RunOptions
from tests.learner.every_method import METHODS, small

pytestmark = pytest.mark.gpu


def after(steps: int, device: torch.device, method: str, sharing: str, **options: object) -> Tensor:
    """All that is trained, in float64, after some steps on one batch."""
    loop = OurLoop(small(method, sharing), RunOptions(device=str(device), **options))  # type: ignore[arg-type]
    loop.session.learner.cohort.double()
    loop.session.learner.method.double()
    for _ in range(steps):
        loop.step()
    return torch.cat([p.detach().flatten() for p in loop.session.learner.parameters()])


@pytest.mark.parametrize("engine", ["grouped", "vmap"])
@pytest.mark.parametrize(
    ("method", "sharing"), [("okddip", "branch"), ("okddip", "network"), ("ffsd", "network")]
)
def test_engines_agree(device: torch.device, method: str, sharing: str, engine: str) -> None:
    plain = after(3, device, method, sharing, engine="loop", precision="fp32")
    other = after(3, device, method, sharing, engine=engine, precision="fp32")
    torch.testing.assert_close(other, plain, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("method", "sharing"), METHODS)
def test_a_fused_step_is_the_plain_one(device: torch.device, method: str, sharing: str) -> None:
    """In float32, one step: the gradients, which is what the fused losses decide."""
    found = []
    for impl in ("torch", "auto"):
        options = RunOptions(device=str(device), engine="loop", precision="fp32", impl=impl)
        loop = OurLoop(small(method, sharing), options)
        session = loop.session
        session.begin_step(len(loop.labels_B))
        gradients(session.learner, loop.images_BHWC, loop.labels_B)
        grads = [p.grad.flatten() for p in session.learner.parameters() if p.grad is not None]
        found.append(torch.cat(grads))
    plain, fused = found
    assert torch.linalg.vector_norm(fused - plain) <= 1e-3 * torch.linalg.vector_norm(plain)
