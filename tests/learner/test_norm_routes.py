"""What computes a norm on a GPU: the Triton form, and PyTorch's where that can't serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastokd.cohort import Cohort
from fastokd.cohort.layers import replace
from fastokd.distributed.ranks import Line
from fastokd.errors import UserError
from fastokd.learner.sync_norm import SyncNorm
from fastokd.models.layers import NormAct
from tests.learner.fake_cuda import CUDA, Dispatched


def dispatched(training: bool = True, gradient: bool = True) -> Dispatched:
    """What a norm with a residual dispatches on CUDA tensors without memory."""
    with FakeTensorMode(), torch.device(CUDA), torch.set_grad_enabled(gradient):
        layer = NormAct(16).train(training)
        layer.impl = "auto"
        x_BCHW = torch.empty(4, 16, 8, 8, dtype=torch.bfloat16).to(
            memory_format=torch.channels_last
        )
        with Dispatched() as seen:
            y_BCHW = layer(x_BCHW, x_BCHW)
    assert (y_BCHW.shape, y_BCHW.stride()) == (x_BCHW.shape, x_BCHW.stride())
    return seen


def test_the_triton_form_serves_steps_and_evaluation() -> None:
    step = dispatched()
    assert (step.ops["fused_bn_act"], step.ops["cudnn_batch_norm"]) == (1, 0)
    assert not step.ops.keys() & {"native_batch_norm", "relu", "add", "add_"}
    evaluated = dispatched(training=False, gradient=False)
    assert evaluated.ops["fused_bn_act_eval"] == 1
    assert not evaluated.ops.keys() & {"native_batch_norm", "relu", "add"}


def test_pytorch_serves_the_compiler_and_gradients_in_eval_mode() -> None:
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        compiled = dispatched()
    for seen in (compiled, dispatched(training=False)):
        assert not any(name.startswith("fused_bn_act") for name in seen.ops)
        assert seen.ops["relu"] == 1


def test_no_norm_of_a_vmap_engine_asks_for_it() -> None:
    """It would raise on a CPU, as that of the other engines does."""
    images_BHWC = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
    cohort = Cohort(("resnet8", 2), 10, engine="vmap", sharing="network", impl="triton")
    assert cohort(images_BHWC).logits_SBC.shape == (2, 4, 10)
    cohort.set_engine("loop")
    with pytest.raises(UserError, match="it needs a GPU"):
        cohort(images_BHWC)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Line]:
    """A process group of this process."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Line(group=dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.filterwarnings(
    "ignore:.*is deprecated:FutureWarning"
)  # torch's, of collectives' names
def test_no_synchronised_norm_asks_for_it(alone: Line) -> None:
    """Likewise."""
    torch.manual_seed(0)
    plain, synchronised = NormAct(16), NormAct(16)
    synchronised.impl = "triton"
    nn.init.normal_(plain.weight)
    synchronised.load_state_dict(plain.state_dict())
    x_BCHW, residual_BCHW = (torch.randn(3, 16, 5, 4) for _ in range(2))
    with pytest.raises(UserError, match="it needs a GPU"):
        synchronised(x_BCHW, residual_BCHW)
    replace(synchronised, SyncNorm, line=alone, relu=True)
    ours, theirs = synchronised(x_BCHW, residual_BCHW), plain(x_BCHW, residual_BCHW)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(synchronised.state_dict(), plain.state_dict())
