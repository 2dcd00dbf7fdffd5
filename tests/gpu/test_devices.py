"""A second GPU: each op and a training step give there what they give on the first one.

The first one stays the current device, as it is where a process uses both. Under the interpreter the
CPU stands for both, so that the file itself is tested.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastokd.benchmark.loops import OurLoop
from fastokd.run.options import RunOptions
from tests.gpu.test_ops_peer_attention_distillation import drawn, found
from tests.learner.every_method import small
from tests.ops import fusion_cases, map_cases, mixture_cases

pytestmark = pytest.mark.gpu
FP32 = torch.float32


@pytest.fixture
def devices() -> Iterator[tuple[torch.device, torch.device]]:
    if torch.cuda.device_count() > 1:
        yield torch.device("cuda:0"), torch.device("cuda:1")
        torch.cuda.set_device(0)
    elif os.environ.get("TRITON_INTERPRET") == "1":
        yield torch.device("cpu"), torch.device("cpu")
    else:
        pytest.skip("there is no second GPU here")


def map_op(op: str) -> Callable[[torch.device], dict[str, Tensor]]:
    def run(device: torch.device) -> dict[str, Tensor]:
        x, y = map_cases.draw(2, 8, 4, 4, dtype=FP32, layout="last", device=device)
        return map_cases.run(op, x, y, "triton")

    return run


OPS: dict[str, Callable[[torch.device], dict[str, Tensor]]] = {
    "mixture": lambda device: mixture_cases.draw(E=1, device=device).run("triton"),
    "peers": lambda device: found("triton", FP32, *drawn(4, 3, 8, device)),
    "fusion": lambda device: fusion_cases.draw(2, 2, 8, 4, 4, device=device).run("triton"),
    **{op: map_op(op) for op in map_cases.OPS},
}


@pytest.mark.parametrize("op", OPS)
def test_an_op(op: str, devices: tuple[torch.device, torch.device]) -> None:
    first, second = (OPS[op](device) for device in devices)
    for name, value in second.items():
        assert value.device == devices[1]
        torch.testing.assert_close(value.cpu(), first[name].cpu(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("method", "sharing"), [("okddip_random", "branch"), ("ffsd", "network")])
def test_a_step(method: str, sharing: str, devices: tuple[torch.device, torch.device]) -> None:
    found = []
    for device in devices:
        options = RunOptions(device=str(device), precision="fp32", engine="loop")
        loop = OurLoop(small(method, sharing), options)
        losses = [loop.step().item() for _ in range(2)]
        assert {p.device for p in loop.session.parameters()} == {device}
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
