"""Max pooling in C++ against torch's, values and the places that gradients go to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.cohort import Cohort
from fastokd.cohort.layers import OpMaxPool2d
from fastokd.errors import UserError
from fastokd.ops.max_pool import max_pool, suits

pytestmark = pytest.mark.usefixtures("cpp_ops", "capability")
LAST = torch.channels_last
# (B, C, H, W): even and odd sides, one row, one place, several registers.
SHAPES = [(3, 16, 8, 8), (2, 48, 7, 5), (1, 64, 1, 6), (2, 16, 1, 1), (1, 32, 2, 3), (5, 16, 3, 2)]


def both(x: Tensor, stride: int) -> list[tuple[Tensor, Tensor]]:
    """Output and gradient of x: the C++'s, and torch's in float64 (float32 holds each value)."""
    y_grad = torch.randn(F.max_pool2d(x.float(), 3, stride, 1).shape).to(x.dtype)
    found = []
    for map_BCHW, impl in ((x, "cpp"), (x.double(), "torch")):
        leaf = map_BCHW.detach().clone(memory_format=LAST).requires_grad_()
        y = max_pool(leaf, stride, impl=impl)
        y.backward(y_grad.to(y.dtype).contiguous(memory_format=LAST))
        assert leaf.grad is not None
        found.append((y.detach(), leaf.grad))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch(shape: tuple[int, ...], stride: int, dtype: torch.dtype) -> None:
    # Few distinct values: ties are many, and their first place must be found.
    x = torch.randint(-3, 3, shape).to(dtype).contiguous(memory_format=LAST)
    (y, grad), (y_exact, exact) = both(x, stride)
    assert y.dtype == grad.dtype == dtype
    assert y.is_contiguous(memory_format=LAST)
    assert grad.is_contiguous(memory_format=LAST)
    assert torch.equal(y.double(), y_exact)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), exact, rtol=step, atol=8 * step)


def test_what_is_not_finite() -> None:
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=LAST)
    x[0, :, 2, 3] = torch.nan
    x[1, :, 4, 4] = torch.inf
    x[1, :, 0, :] = -torch.inf
    x[:, 3] = -torch.inf
    (y, grad), (y_exact, exact) = both(x, 2)
    torch.testing.assert_close(y.double(), y_exact, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(grad.double(), exact, equal_nan=True)


def test_any_number_of_threads() -> None:
    x = torch.randn(3, 16, 33, 9).contiguous(memory_format=LAST)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaf = x.clone(memory_format=LAST).requires_grad_()
            y = max_pool(leaf, 2, impl="cpp")
            (y * torch.arange(y.numel()).view_as(y)).sum().backward()
            results.append((y.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    for y, grad in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_what_is_refused_and_what_is_left_to_torch() -> None:
    for x, said in (
        (torch.randn(2, 16, 4, 4), "channels-last"),
        (torch.randn(2, 8, 4, 4).contiguous(memory_format=LAST), "multiple of 16"),
        (torch.randn(0, 16, 4, 4), "not empty"),
        (torch.randn(2, 16, 4, 4).double().contiguous(memory_format=LAST), "float64"),
    ):
        with pytest.raises(UserError, match=said):
            max_pool(x, 2, impl="cpp")
        assert torch.equal(max_pool(x, 2), F.max_pool2d(x, 3, 2, 1))
    assert suits(nn.MaxPool2d(3, 2, 1))
    for pool in (
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2),
        nn.MaxPool2d(3, 3, 1),
        nn.MaxPool2d(3, 2, 1, dilation=2),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d(3, 2, 1, return_indices=True),
    ):
        assert not suits(pool)
    op = torch.ops.fastokd.max_pool
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=LAST)
    with pytest.raises(RuntimeError, match="stride"):
        op(x, 3)
    y, taps = op(x, 2)
    torch.library.opcheck(op, (x, 2), test_utils=("test_schema", "test_faketensor"))
    for bad in ((y, taps, 2, 9, 4), (y, taps.int(), 2, 4, 4), (y, taps[:1], 2, 4, 4)):
        with pytest.raises(RuntimeError):
            torch.ops.fastokd.max_pool_backward(*bad)


def test_a_cohorts_pools_use_it() -> None:
    cohort = Cohort(("googlenet", 2), 10)
    pools = [module for module in cohort.modules() if isinstance(module, nn.MaxPool2d)]
    assert pools
    assert all(isinstance(pool, OpMaxPool2d) for pool in pools)


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_is_the_compilers_own_where_it_compiles(dynamic: bool) -> None:
    def loss(x: Tensor) -> Tensor:
        return max_pool(x, 2).square().sum()

    torch._dynamo.reset()  # of the other cases
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(loss, backend=backend, dynamic=dynamic)
    for batch in (2, 3):
        x = torch.randn(batch, 16, 6, 6).contiguous(memory_format=LAST).requires_grad_()
        compiled(x).backward()
        assert x.grad is not None
        ours = x.grad.clone()
        x.grad = None
        loss(x).backward()
        torch.testing.assert_close(ours, x.grad)
    assert graphs
    assert all("max_pool2d" in graph and "fastokd" not in graph for graph in graphs)
