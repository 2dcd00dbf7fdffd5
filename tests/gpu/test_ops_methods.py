"""``--impl triton`` trains every method, and the step is PyTorch's; tensors without elements."""

from __future__ import annotations

import pytest
import torch
from fastokd.kernels import fused_bn_act

from fastokd.benchmark.loops import OurLoop
from fastokd.run.options import RunOptions
from tests.learner.every_method import ONCE, small
from tests.ops.empty_cases import CASES, assert_as_the_reference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def few_tiles(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time is that of the operations, not of their sizes."""
    if triton_device.type == "cpu":
        monkeypatch.setattr(fused_bn_act, "TILE", 1 << 16)


# FFSD's losses read the students' maps, which lie in memory as the engine leaves them.
@pytest.mark.parametrize(
    ("method", "sharing", "engine"),
    [
        *((method, sharing, "loop") for method, sharing in ONCE),
        ("ffsd", "network", "grouped"),
        ("ffsd", "network", "vmap"),
    ],
)
def test_every_method(method: str, sharing: str, engine: str, triton_device: torch.device) -> None:
    found = []
    for impl in ("triton", "torch"):
        options = RunOptions(
            device=str(triton_device), precision="fp32", engine=engine, impl=impl, quiet=True
        )
        loop = OurLoop(small(method, sharing), options)
        before = [p.detach().clone() for p in loop.session.learner.parameters()]
        total = loop.step()
        moves = zip(loop.session.learner.parameters(), before, strict=True)
        found.append((total, torch.cat([(p.detach() - was).flatten() for p, was in moves])))
    (ours, our_move), (theirs, their_move) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    apart = torch.linalg.vector_norm(our_move - their_move) / torch.linalg.vector_norm(their_move)
    assert apart < 1e-2  # Adam's first step is a gradient's sign, and some gradients are next to 0


@pytest.mark.parametrize(("op", "dim"), CASES)
def test_without_one_dimension(op: str, dim: str, triton_device: torch.device) -> None:
    with triton_device:
        assert_as_the_reference(op, dim, "triton")
