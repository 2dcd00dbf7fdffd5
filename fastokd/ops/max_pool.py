"""3x3 max pooling with padding 1, as after a ResNet's stem.

    y[b, c, h, w] = max over i, j in 0..2 of x[b, c, h s + i - 1, w s + j - 1]

The first of equal values gets the gradient, and NaN propagates, as in torch. torch saves its input and
an index of 8 bytes a value for the backward pass; the C++ saves one byte a value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.ops._library import define
from fastokd.ops.dispatch import choose

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def suits(pool: nn.MaxPool2d) -> bool:
    """Whether the layer is 3x3 pooling with padding 1 and stride 1 or 2."""
    return (
        pool.kernel_size in (3, (3, 3))
        and pool.padding in (1, (1, 1))
        and pool.stride in (1, 2, (1, 1), (2, 2))
        and pool.dilation in (1, (1, 1))
        and not pool.ceil_mode
        and not pool.return_indices
    )


def max_pool(x_BCHW: Tensor, stride: int, *, impl: str = "auto") -> Tensor:
    """``F.max_pool2d(x, 3, stride, 1)``, ``[B, C, OH, OW]``. Differentiable once.

    Args:
        x_BCHW: floating point; the C++ takes channels-last maps whose C is a multiple of 16.
        stride: 1 or 2.
        impl: ``"auto"``, ``"torch"`` or ``"cpp"``.

    Raises:
        UserError: an ``impl`` that can't serve the call.
    """
    # A map inside of vmap has no memory layout to ask for.
    refusal = None if impl == "torch" else _refusal(x_BCHW)
    if choose("max_pool", impl, x_BCHW.device, {"cpp": refusal}) == "torch":
        return F.max_pool2d(x_BCHW, 3, stride, 1)
    y_BCHW: Tensor = torch.ops.fastokd.max_pool(x_BCHW, stride)[0]
    return y_BCHW


def _refusal(x_BCHW: Tensor) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile generates its own"
    if x_BCHW.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {x_BCHW.dtype}"
    if x_BCHW.dim() != 4 or x_BCHW.shape[1] % 16 or x_BCHW.numel() == 0:
        return "it takes maps that are not empty, of a multiple of 16 channels"
    if not x_BCHW.is_contiguous(memory_format=torch.channels_last):
        return "it takes channels-last maps"
    return None


def _fake(x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    y = F.max_pool2d(x, 3, stride, 1)
    return y, torch.empty_like(y, dtype=torch.uint8)


def _fake_backward(grad_y: Tensor, taps: Tensor, stride: int, height: int, width: int) -> Tensor:
    shape = (*grad_y.shape[:2], height, width)
    return grad_y.new_empty(shape).contiguous(memory_format=torch.channels_last)


# Their autograd formulas are C++ too (csrc/max_pool.cpp).
define("max_pool(Tensor x, int stride) -> (Tensor, Tensor)", _fake)
define(
    "max_pool_backward(Tensor grad_y, Tensor taps, int stride, int height, int width) -> Tensor",
    _fake_backward,
)
