"""A step under DistributedDataParallel over NCCL, in a group of one process, captured and not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastokd.learner.replicas import Replicas
from tests.gpu.test_capture import graphs, session_of, train
from tests.learner.every_method import small

pytestmark = pytest.mark.gpu


@pytest.fixture
def group(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone, which is no run of several ranks to fastokd."""
    monkeypatch.setitem(os.environ, "TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{tmp_path / 'store'}",
        rank=0,
        world_size=1,
        device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("method", ["okddip", "ffsd"])
def test_a_ddp_step_is_the_plain_one(
    device: torch.device, group: None, method: str, captured: bool
) -> None:
    one = small(method, "network", lr=0.01)
    plain, replicated = (session_of(device, one, how) for how in (False, captured))
    learner = replicated.learner
    learner.forward = learner.replicas = Replicas(
        learner.forward, learner.cohort, learner.method, learner.ranks.data.group, accumulates=False
    )
    learner.guard.share = largest
    theirs, theirs_end = train(plain, [6] * 16)
    ours, ours_end = train(replicated, [6] * 16)
    assert learner.replicas.ddp is not None
    assert not captured or graphs(replicated) == 1
    assert ours == pytest.approx(theirs, rel=1e-2)
    assert torch.linalg.vector_norm(ours_end - theirs_end) < 1e-2 * torch.linalg.vector_norm(
        theirs_end
    )


def largest(value: Tensor) -> None:
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
