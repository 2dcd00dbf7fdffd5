"""The device that a command names is the current one; what is copied there doesn't wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastokd.benchmark.loops import PublishedLoop
from fastokd.benchmark.peak import InstructionPeak, MatmulPeak
from fastokd.device import CASTS, PRECISIONS, staged, use_device
from fastokd.evaluate import evaluate_published
from fastokd.ops import cpp
from fastokd.recipe.names import recipe
from fastokd.run.build import build
from fastokd.run.options import RunOptions
from fastokd.student import authors

RECIPE = recipe("okddip-branch@2/resnet8/digits")
SECOND = RunOptions(device="cuda:1")


class MadeCurrentError(Exception):
    """The device that was made the current one."""


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_device(device: torch.device) -> None:
        raise MadeCurrentError(str(device))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(authors, "read", lambda *_, **__: None)


@pytest.mark.parametrize(
    "begin",
    [
        lambda: build(RECIPE, SECOND),
        lambda: PublishedLoop.drawn(RECIPE, SECOND),
        lambda: evaluate_published(Path("file"), "digits", model=None, options=SECOND),
    ],
)
def test_a_named_gpu_is_the_current_one(begin: Callable[[], object], two_gpus: None) -> None:
    with pytest.raises(MadeCurrentError, match=r"^cuda:1$"):
        begin()


def test_a_device_without_an_index_leaves_the_current_one(two_gpus: None) -> None:
    assert use_device("cuda") == torch.device("cuda")
    assert use_device("cpu") == torch.device("cpu")


def test_what_is_copied_to_a_gpu_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    host, pinned = torch.ones(3), torch.ones(3)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned)
    assert staged(host, torch.device("cuda:0")) is pinned
    assert staged(host, torch.device("cpu")) is host


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_every_precision_has_a_peak(precision: str) -> None:
    peak = MatmulPeak(torch.device("cpu"), precision, side=32)
    peak.measure()
    assert peak.best > 0
    assert peak.a.dtype == CASTS.get(precision, torch.float32)


@pytest.mark.parametrize("name", [*cpp.CAPABILITIES, "avx512bf16"])
def test_multiply_adds_are_counted(name: str, cpp_ops: None) -> None:
    """By lanes and sums; pairs of bfloat16 only where the CPU multiplies them."""
    before = cpp.capability()
    if not cpp.set_capability(name):
        pytest.skip(f"this CPU has no {name}")
    lanes, sums = {"default": (4, 12), "avx2": (8, 12)}.get(name, (16, 16))
    pairs = 4 * lanes * sums if name == "avx512bf16" else 0
    try:
        assert cpp.multiply_adds(7, bf16=False) == 7 * 2 * lanes * sums
        assert cpp.multiply_adds(7, bf16=True) == 7 * pairs
    finally:
        cpp.set_capability(before)


@pytest.mark.parametrize(("device", "precision"), [("cuda", "bf16"), ("cpu", "fp16")])
def test_the_peak_of_unknown_instructions_is_none(device: str, precision: str) -> None:
    peak = InstructionPeak(torch.device(device), precision)
    peak.measure()
    assert peak.best is None


def test_the_peak_of_the_instructions(cpp_ops: None) -> None:
    peak = InstructionPeak(torch.device("cpu"), "fp32")
    peak.measure()
    assert peak.best is not None
    assert peak.best > 1e8  # a core of any machine does more
