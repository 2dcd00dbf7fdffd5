"""The Triton kernels of max pooling against PyTorch, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from fastokd.kernels import max_pool as kernel
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.cohort.layers import OpMaxPool2d, replace
from fastokd.errors import UserError
from fastokd.ops.max_pool import max_pool
from tests.ops.poison import poisoned

pytestmark = pytest.mark.gpu
LAST = torch.channels_last
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Channels: one; not a power of two, in one block and in several; a tile's; more than a tile's. Rows and
# columns: one; odd and even; fewer and more than a program's; several blocks of columns.
SHAPES = [
    (2, 1, 1, 1),
    (3, 16, 8, 8),
    (2, 48, 7, 5),
    (1, 64, 1, 6),
    (5, 17, 3, 2),
    (1, 8, 10, 141),
    (1, 100, 11, 12),
    (2, 1100, 2, 3),
]


def maps(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=LAST)


def upstream(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """In half precision numbers of few digits, whose sums are exact: no rounding is compared."""
    few = torch.randint(-8, 8, shape)
    return maps((torch.randn(shape) if dtype == torch.float32 else few).to(dtype))


def both(
    x: Tensor, stride: int, device: torch.device, grad_y: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Output and gradient of x: the kernels', then PyTorch's on the CPU in float32, rounded once."""
    shape = (*x.shape[:2], *((side - 1) // stride + 1 for side in x.shape[2:]))
    grad_y = upstream(shape, x.dtype) if grad_y is None else grad_y
    leaf = x.to(device).requires_grad_()
    y = max_pool(leaf, stride, impl="triton")
    (grad,) = torch.autograd.grad(y, leaf, grad_y.to(device))
    assert y.dtype == grad.dtype == x.dtype
    assert y.is_contiguous(memory_format=LAST)
    assert grad.is_contiguous(memory_format=LAST)
    with poisoned(False):
        exact = x.float().requires_grad_()
        y_exact = F.max_pool2d(exact, 3, stride, 1)
        (wanted,) = torch.autograd.grad(y_exact, exact, grad_y.float())
    return [(y.detach().cpu(), grad.cpu()), (y_exact.detach().to(x.dtype), wanted.to(x.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(
    shape: tuple[int, ...], stride: int, dtype: torch.dtype, poisoned_device: torch.device
) -> None:
    # Few distinct values: ties are many, and their first place must be found. Whole windows of -inf.
    x = torch.randint(-2, 2, shape).to(dtype)
    x[x == -2] = -torch.inf
    x[:, :, : shape[2] // 2] = -torch.inf
    (y, grad), (y_exact, wanted) = both(maps(x), stride, poisoned_device)
    assert torch.equal(y, y_exact)
    assert torch.equal(grad, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
def test_nan_goes_where_torchs_goes(
    stride: int, dtype: torch.dtype, poisoned_device: torch.device
) -> None:
    """Into every window, and the gradient to the window's last NaN, beside inf too."""
    x = torch.randn(3, 17, 9, 8).to(dtype)
    x[torch.rand(x.shape) < 0.2] = math.nan
    x[torch.rand(x.shape) < 0.1] = math.inf
    (y, grad), (y_exact, wanted) = both(maps(x), stride, poisoned_device)
    assert y.isnan().any()
    assert torch.equal(y.isnan(), y_exact.isnan())
    assert torch.equal(y.nan_to_num(), y_exact.nan_to_num())
    assert torch.equal(grad, wanted)


def test_non_finite_gradients_stay_where_they_are(poisoned_device: torch.device) -> None:
    grad_y = maps(torch.randn(2, 16, 4, 3))
    grad_y[0, 3, 1, 1], grad_y[1, 5, 2, 0], grad_y[1, 6] = math.nan, math.inf, -math.inf
    (_, grad), (_, wanted) = both(maps(torch.randn(2, 16, 7, 6)), 2, poisoned_device, grad_y)
    torch.testing.assert_close(grad, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", ["stride 0", "NCHW", "sliced"])
def test_incoming_gradient_of_any_layout(form: str, poisoned_device: torch.device) -> None:
    grad_y = torch.randn(3, 16, 4, 8)[..., ::2]
    if form == "stride 0":
        grad_y = torch.tensor(0.5).expand(3, 16, 4, 4)
    elif form == "NCHW":
        grad_y = grad_y.contiguous()
    (_, grad), (_, wanted) = both(maps(torch.randn(3, 16, 7, 8)), 2, poisoned_device, grad_y)
    assert torch.equal(grad, wanted)


# The stem of a ResNet at 224 pixels; pools of a GoogLeNet. Few images under the interpreter.
@pytest.mark.parametrize(
    ("shape", "stride"), [((64, 64, 112, 112), 2), ((128, 480, 16, 16), 1), ((128, 832, 8, 8), 1)]
)
def test_training_shapes(
    shape: tuple[int, ...], stride: int, poisoned_device: torch.device
) -> None:
    if poisoned_device.type == "cpu":
        shape = (1, min(shape[1], 128), min(shape[2], 12), shape[3])
    x = maps(torch.randn(shape).relu().bfloat16())
    (y, grad), (y_exact, wanted) = both(x, stride, poisoned_device)
    assert torch.equal(y, y_exact)
    assert torch.equal(grad, wanted)


def test_second_derivative_is_refused(poisoned_device: torch.device) -> None:
    x = maps(torch.randn(2, 16, 5, 4)).to(poisoned_device).requires_grad_()
    y = max_pool(x, 2, impl="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_it_leaves_to_torch(triton_device: torch.device) -> None:
    x = maps(torch.randn(2, 16, 6, 6)).to(triton_device)
    for other, says in (
        (x.double(), "float64"),
        (x.contiguous(), "channels-last"),
        (x[:0], "not empty"),
        (x[0], r"\[B, C, H, W\]"),
    ):
        with pytest.raises(UserError, match=says):
            max_pool(other, 2, impl="triton")
        assert torch.equal(max_pool(other, 2), F.max_pool2d(other, 3, 2, 1))
    with pytest.raises(UserError, match="a stride of 1 or 2, not 3"):
        max_pool(x, 3, impl="triton")


def test_vmap_is_left_to_torch(triton_device: torch.device) -> None:
    x = torch.randn(2, 3, 16, 6, 6, device=triton_device)
    y = torch.func.vmap(lambda one: max_pool(one, 2))(x)
    assert torch.equal(y, torch.stack([F.max_pool2d(one, 3, 2, 1) for one in x]))
    with pytest.raises(UserError, match="vmap"):
        torch.func.vmap(lambda one: max_pool(one, 2, impl="triton"))(x)


def test_a_layer_of_a_cohort_takes_it(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = nn.MaxPool2d(3, 2, 1)
    replace(pool, OpMaxPool2d, impl="auto" if triton_device.type == "cuda" else "triton")
    launched = []

    def seen(*args: object) -> None:
        launched.append(args[0])
        launch(*args)  # type: ignore[arg-type]

    launch = kernel._launch
    monkeypatch.setattr(kernel, "_launch", seen)
    x = maps(torch.randn(2, 64, 8, 8)).to(triton_device).requires_grad_()
    pool(x).sum().backward()
    assert launched == [kernel.pool_kernel, kernel.gradient_kernel]


def test_more_elements_than_int32_counts(poisoned_device: torch.device) -> None:
    """Two halves of a map of 5 GB, the second one a copy of the first: both have the same results."""
    if poisoned_device.type == "cpu":
        pytest.skip("it needs a GPU's memory")
    x = torch.randn(16, 2048, 200, 200, device=poisoned_device, dtype=torch.bfloat16)
    x = maps(torch.cat([x, x])).requires_grad_()
    assert x.numel() > 2**31
    y = max_pool(x, 2, impl="triton")
    (grad,) = torch.autograd.grad(y, x, y.detach())
    for value in (y.detach(), grad):
        assert torch.equal(value[:16], value[16:])
    assert torch.equal(y[16:].detach(), F.max_pool2d(x[:16].detach(), 3, 2, 1))


def test_the_operators_fake_results(poisoned_device: torch.device) -> None:
    if poisoned_device.type == "cpu":
        pytest.skip("the interpreter's launchers are called without the dispatcher")
    x = maps(torch.randn(3, 17, 5, 4, device=poisoned_device))
    utils = ("test_schema", "test_faketensor")
    ops = torch.ops.fastokd
    with poisoned(False):
        torch.library.opcheck(ops.max_pool.default, (x, 2), test_utils=utils)
        y, taps = ops.max_pool(x, 2)
        args = (y, taps, 2, 5, 4)
        torch.library.opcheck(ops.max_pool_backward.default, args, test_utils=utils)
