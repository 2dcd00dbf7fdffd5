"""What computes max pooling on a GPU: the Triton form, and PyTorch's where that can't serve."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastokd.cohort import Cohort
from fastokd.cohort.layers import OpMaxPool2d, replace
from tests.learner.fake_cuda import CUDA, Dispatched

OURS, TORCHS = "max_pool", "max_pool2d_with_indices"


def dispatched(
    dtype: torch.dtype = torch.bfloat16,
    layout: torch.memory_format = torch.channels_last,
    channels: int = 64,
) -> Dispatched:
    """What a ResNet's pooling dispatches on CUDA tensors without memory."""
    layer = nn.MaxPool2d(3, 2, 1)
    replace(layer, OpMaxPool2d)
    with FakeTensorMode(), torch.device(CUDA):
        x_BCHW = torch.empty(4, channels, 9, 8, dtype=dtype).contiguous(memory_format=layout)
        with Dispatched() as seen:
            y_BCHW = layer(x_BCHW.requires_grad_())
    assert y_BCHW.shape == (4, channels, 5, 4)
    assert y_BCHW.is_contiguous(memory_format=layout)
    assert not seen.on_the_host
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_triton_form_serves_any_number_of_channels(dtype: torch.dtype) -> None:
    for channels in (64, 100, 3):
        seen = dispatched(dtype, channels=channels)
        assert (seen.ops[OURS], seen.ops[TORCHS]) == (1, 0)


def test_pytorch_serves_the_rest() -> None:
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        compiled = dispatched()
    others = (dispatched(torch.float64), dispatched(layout=torch.contiguous_format))
    for seen in (compiled, *others):
        assert (seen.ops[OURS], seen.ops[TORCHS]) == (0, 1)


@pytest.mark.parametrize(("engine", "calls"), [("loop", 2), ("grouped", 1), ("vmap", 0)])
def test_the_engines_pools(engine: str, calls: int, cpp_ops: None) -> None:
    """The grouped engine pools one map as wide as all students' together. Counted on a CPU, which has the
    same layers."""
    cohort = Cohort(("resnet18", 2), 10, engine=engine, sharing="network", image_size=64)
    cohort.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images_BHWC = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    with Dispatched() as seen:
        assert cohort(images_BHWC).logits_SBC.shape == (2, 2, 10)
    assert seen.ops[OURS] == calls
    assert bool(seen.ops[TORCHS]) == (engine == "vmap")
