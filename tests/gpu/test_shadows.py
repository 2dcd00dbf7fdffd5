"""Weights that are cast together, on the device: autocast's bits, in fewer launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastokd.cohort import shadows
from tests.gpu.captured_gradients import Captured, edges

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_kernel_selection")]


def by_autocast(sites: object) -> None:
    """In place of ``target``: autocast casts the weights."""


@pytest.mark.parametrize("engine", ["loop", "grouped", "vmap"])
@pytest.mark.parametrize("sharing", ["branch", "network"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gradients_are_autocasts(
    device: torch.device,
    precision: str,
    sharing: str,
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    how: dict[str, Any] = {"engine": engine, "streams": engine == "loop"}
    ours = Captured(device, "okddip", sharing, precision, **how)(1)
    monkeypatch.setattr(shadows, "target", by_autocast)
    theirs = Captured(device, "okddip", sharing, precision, **how)(1)
    assert len(theirs) == len(ours)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("sharing", ["branch", "network"])
def test_each_student_s_weights_are_one_launch(
    device: torch.device, sharing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy whose tensors differ in dtype or strides would be a launch a weight."""
    if device.type != "cuda":
        pytest.skip("a CPU has no graphs")
    ours = Captured(device, "okddip", sharing, "bf16")
    cohort = ours.learner.cohort
    weights = len(shadows.sites_of(*cohort._members()))
    copies = len(cohort.students)
    if cohort.trunk is not None:
        weights += len(shadows.sites_of(cohort.trunk))
        copies += 1
    nodes, _ = edges(ours)
    monkeypatch.setattr(shadows, "target", by_autocast)
    theirs, _ = edges(Captured(device, "okddip", sharing, "bf16"))
    assert theirs - nodes >= 2 * (weights - copies)
