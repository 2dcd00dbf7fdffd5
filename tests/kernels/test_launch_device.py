"""Every launch is made with the tensors' device as the current one: Triton knows no other."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastokd import kernels
from fastokd.ops import max_pool, memory_contrast  # noqa: F401  # define their operators
from fastokd.ops._library import LAUNCHERS
from tests.proofs.offline import _Driver

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels aren't launched"
)


def calls() -> dict[str, tuple[Any, ...]]:
    """A call of every launcher, with every gradient."""
    x = torch.zeros(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    pixels, one, saved = torch.zeros(2, 9), torch.ones(()), torch.zeros(4, 2)
    weight, channel, count = (
        torch.zeros(8, 1, 3, 3),
        torch.zeros(8),
        torch.zeros((), dtype=torch.long),
    )
    z = torch.zeros(2, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    logits, labels, scores = (
        torch.zeros(3, 2, 5),
        torch.zeros(2, dtype=torch.long),
        torch.zeros(3, 3),
    )
    query = torch.zeros(2, 2, 4)
    weights = (None, one, None, None, 1.0, 1.0, 0.0, 3.0, "logits", False, 0.0)
    return {
        "attention_map": (x,),
        "attention_map_backward": (x, pixels, torch.zeros(2), pixels),
        "attention_pair": (x, x.clone(), False, True, True),
        "attention_pair_backward": (x, pixels, one),
        "shifted_map": (x,),
        "feature_pair": (x, x.clone()),
        "feature_pair_backward": (x, x.clone(), saved, one, True, True),
        "fused_bn_act": (x, *(channel[:4],) * 4, count, x, True, 0.1, 1e-5),
        "fused_bn_act_backward": (
            x, x, torch.zeros(18, 1, dtype=torch.uint8), channel[:4], torch.zeros(4, 4), True, True, True
        ),
        "fused_bn_act_eval": (x, *(channel[:4],) * 4, x, True, 1e-5),
        "fusion_step": ([x, x.clone()], weight, channel, channel, channel, channel, count, 0.1, 1e-5),
        "fusion_step_backward": (
            z, [x, x.clone()], weight, channel, channel, z.clone(), torch.zeros(2, 8), True
        ),
        "max_pool": (x, 2),
        "max_pool_backward": (x, x.to(torch.uint8), 2, 6, 5),
        "memory_similarities": (query, torch.zeros(2, 7, 4), labels[:, None].expand(2, 5), 2.0),
        "memory_similarities_backward": (
            torch.zeros(2, 2, 2, 5), torch.zeros(2, 7, 4), labels[:, None].expand(2, 5), 2.0
        ),
        "decoupled_distillation": (logits, logits[:1], labels, 1.0, 8.0, 4.0, True),
        "correlation_distillation": (logits, logits[:1], 1.0, 1.0, 4.0, True),
        "mixture_distillation": (
            logits, None, labels, scores, None, *weights, True, False, True, False
        ),
        "peer_attention_distillation": (
            logits, None, labels, query, query.clone(), *weights, True, False, True, True
        ),
    }  # fmt: skip


def name(kernel: Any) -> str:
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Tensor | None]]]:
    """Each kernel that is launched, with the tensor whose device is the current one."""
    current: list[Tensor] = []
    seen: list[tuple[str, Tensor | None]] = []

    class DeviceOf:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def __enter__(self) -> None:
            current.append(self.tensor)

        def __exit__(self, *_: object) -> None:
            current.pop()

    class Driver(_Driver):
        def get_current_target(self) -> Any:
            assert current, "the current device is asked before it is the tensors'"
            return super().get_current_target()

    def run(kernel: Any, *_: Any, **__: Any) -> None:
        seen.append((name(kernel), current[-1] if current else None))

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver("sm_90"))
    yield seen
    assert not current


@pytest.mark.parametrize("op", sorted(LAUNCHERS))
def test_launches_on_the_device_of_its_tensors(
    op: str, launched: list[tuple[str, Tensor | None]]
) -> None:
    args = calls()[op]
    LAUNCHERS[op](*args)
    assert launched
    first = args[0] if isinstance(args[0], Tensor) else args[0][0]
    for kernel, tensor in launched:
        assert tensor is first, f"{kernel} is launched on whatever device is current"


def test_every_kernel_is_launched_by_one_of_them(
    launched: list[tuple[str, Tensor | None]],
) -> None:
    for op, args in calls().items():
        LAUNCHERS[op](*args)
    there = {
        name(value)
        for module in pkgutil.iter_modules(kernels.__path__)
        for value in vars(importlib.import_module(f"fastokd.kernels.{module.name}")).values()
        if isinstance(value, JITFunction) and value.fn.__name__.endswith("_kernel")
    }
    assert {kernel for kernel, _ in launched} == there
