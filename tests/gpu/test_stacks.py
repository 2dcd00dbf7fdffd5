"""Students' tensors as slices of stacked ones, on the device: the bits of copies, in fewer launches."""

from __future__ import annotations

import pytest
import torch

from fastokd.cohort.stacks import Stack
from tests.gpu.captured_gradients import Captured, edges

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_kernel_selection")]


def copied(stack: Stack) -> None:
    """In place of ``join``: each forward stacks by a copy."""


@pytest.mark.parametrize("engine", ["grouped", "vmap"])
@pytest.mark.parametrize("sharing", ["branch", "network"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_are_those_of_copies(
    device: torch.device,
    precision: str,
    sharing: str,
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = Captured(device, "okddip", sharing, precision, engine=engine)
    values = ours(1)
    monkeypatch.setattr(Stack, "join", copied)
    theirs = Captured(device, "okddip", sharing, precision, engine=engine)
    for value, other in zip(values, theirs(1), strict=True):
        assert torch.equal(value, other)
    state = theirs.learner.cohort.state_dict()
    for key, x in ours.learner.cohort.state_dict().items():
        assert torch.equal(x, state[key]), key


@pytest.mark.parametrize("engine", ["grouped", "vmap"])
def test_no_launch_stacks(
    device: torch.device, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of each parameter and running statistic, and one back."""
    if device.type != "cuda":
        pytest.skip("a CPU has no graphs")
    ours = Captured(device, "okddip", "network", "bf16", engine=engine)
    stacks = ours.learner.cohort._stacks
    assert all(stack._joined(stack.parts()) for stack in stacks)
    nodes, _ = edges(ours)
    monkeypatch.setattr(Stack, "join", copied)
    theirs, _ = edges(Captured(device, "okddip", "network", "bf16", engine=engine))
    assert theirs - nodes >= len(stacks)
