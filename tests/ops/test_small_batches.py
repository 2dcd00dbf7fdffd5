"""The C++ ops split the work of a batch smaller than the number of threads, without other results."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastokd.ops import attention, cpp
from fastokd.ops.conv import conv2d, conv_transpose2d
from fastokd.ops.feature_transfer import feature_transfer
from fastokd.ops.fused_bn_act import fused_bn_act
from fastokd.ops.max_pool import max_pool

THREADS = 4
LAST = torch.channels_last
Op = Callable[[Tensor, Tensor], Tensor]


def convolution(outputs: int, stride: int) -> Op:
    return lambda x, w: conv2d(x, w[:outputs], None, stride, 1, impl="auto")


def norm(x_BCHW: Tensor, _: Tensor) -> Tensor:
    C = x_BCHW.shape[1]
    weight_C, bias_C = torch.ones(C, requires_grad=True), torch.zeros(C, requires_grad=True)
    state = (torch.zeros(C), torch.ones(C), torch.tensor(0))
    return fused_bn_act(x_BCHW, weight_C, bias_C, *state, impl="cpp")


OPS: dict[str, Op] = {
    "convolution": convolution(64, 1),
    "convolution of stride 2": convolution(32, 2),
    "transposed convolution": lambda x, w: conv_transpose2d(x, w),
    "norm": norm,
    "max pool": lambda x, _: max_pool(x, 2, impl="cpp"),
    "attention map": lambda x, _: attention.attention_map(x, impl="cpp"),
    "attention transfer": lambda x, _: attention.attention_transfer(x, x.detach() + 1, impl="cpp"),
    "attention diversity": lambda x, _: attention.attention_diversity(
        x, x.detach() + 1, impl="cpp"
    ),
    "feature transfer": lambda x, _: feature_transfer(x, x.detach() + 1, impl="cpp"),
}
NEEDS_BF16 = {"convolution", "convolution of stride 2", "transposed convolution"}


@pytest.fixture(autouse=True)
def threads(cpp_ops: None) -> Iterator[None]:
    threads, capability = torch.get_num_threads(), cpp.capability()
    yield
    torch.set_num_threads(threads)
    cpp.set_capability(capability)


def run(op: Op, B: int, threads: int) -> tuple[list[Tensor], list[int]]:
    """The output and gradients, and how many threads the forward and the backward kept busy."""
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, 64, 32, 32, generator=g).bfloat16().contiguous(memory_format=LAST)
    weight = torch.randn(64, 64, 3, 3, generator=g) / 24
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    busy = []
    cpp.busy_threads()
    y = op(*inputs)
    busy.append(cpp.busy_threads())
    grad_y = torch.randn(y.shape, generator=g).to(y.dtype)
    if y.dim() == 4:
        grad_y = grad_y.contiguous(memory_format=LAST)
    grads = torch.autograd.grad(y, inputs, grad_y, allow_unused=True)
    busy.append(cpp.busy_threads())
    return [y.detach(), *(grad for grad in grads if grad is not None)], busy


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("B", [1, 3])
def test_every_thread_works(name: str, B: int) -> None:
    if name in NEEDS_BF16 and not cpp.set_capability("avx512bf16"):
        pytest.skip("this CPU has no AVX-512 BF16")
    alone, _ = run(OPS[name], B, 1)
    shared, busy = run(OPS[name], B, THREADS)
    assert busy == [THREADS, THREADS]
    for one, other in zip(alone, shared, strict=True):
        if one.shape[2:] == (3, 3):  # a weight's gradient: sums by thread
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-3)
        else:
            assert torch.equal(one, other)


@pytest.mark.parametrize(("B", "C", "H"), [(1, 2048, 7), (4, 512, 4), (2, 512, 14)])
def test_wide_norms_of_few_pixels(B: int, C: int, H: int) -> None:
    torch.set_num_threads(THREADS)
    x = torch.randn(B, C, H, H).contiguous(memory_format=LAST).requires_grad_()
    cpp.busy_threads()
    y = norm(x, x)
    assert cpp.busy_threads() == THREADS
    y.backward(torch.ones_like(y))
    assert cpp.busy_threads() == THREADS


def test_a_weight_gradient_alone() -> None:
    """Of one image: by bands of its rows; of fewer rows than threads: by as many as there are."""
    if not cpp.set_capability("avx512bf16"):
        pytest.skip("this CPU has no AVX-512 BF16")
    torch.set_num_threads(THREADS)
    for H, wanted in ((9, THREADS), (2, 2)):
        x = torch.randn(1, 16, H, 8).bfloat16().contiguous(memory_format=LAST)
        y = torch.randn(1, 16, H, 8).bfloat16().contiguous(memory_format=LAST)
        cpp.busy_threads()
        found = torch.ops.fastokd.conv_weight_grad(y, x, 3, 1, 1)
        assert cpp.busy_threads() == wanted
        exact = torch.ops.aten.convolution_backward(
            y.double(), x.double(), torch.zeros(16, 16, 3, 3).double(), None,
            [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False],
        )[1]  # fmt: skip
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3)
