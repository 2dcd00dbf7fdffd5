"""3x3 max pooling with padding 1, as after a ResNet's stem.

    y[b, c, h, w] = max over i, j in 0..2 of x[b, c, h s + i - 1, w s + j - 1]

The first of equal values gets the gradient, and NaN propagates, as in torch. torch saves its input and
an index of 8 bytes a value for the backward pass; the C++ and the Triton form save one byte a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastokd.ops._library import define, operator
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
    """``F.max_pool2d(x, 3, stride, 1)``, ``[B, C, OH, OW]``.

    Args:
        x_BCHW: floating point. The C++ and the Triton form take channels-last maps in float32, bfloat16
            and float16, the C++ those whose C is a multiple of 16.
        stride: 1 or 2.
        impl: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``. Under ``torch.compile`` and
            ``torch.func`` only PyTorch's runs. ``"auto"`` takes PyTorch's for what the others don't take.

    Returns:
        y, in x's dtype and layout. The C++ and Triton forms are differentiable once.

    Raises:
        UserError: an ``impl`` that can't serve the call.
    """
    fast = impl if impl != "auto" else "triton" if x_BCHW.is_cuda else "cpp"
    refusals = {fast: _refusal(fast, x_BCHW, stride)} if fast in ("cpp", "triton") else {}
    chosen = choose("max_pool", impl, x_BCHW.device, refusals)
    if chosen == "torch":
        return F.max_pool2d(x_BCHW, 3, stride, 1)
    y_BCHW: Tensor
    if chosen == "cpp":
        y_BCHW = torch.ops.fastokd.max_pool(x_BCHW, stride)[0]
    else:
        y_BCHW = MaxPool.apply(chosen, stride, x_BCHW)
    return y_BCHW


def _refusal(fast: str, x_BCHW: Tensor, stride: int) -> str | None:
    """Why the implementation ``fast`` can't take these arguments, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile generates its own"
    if torch._C._are_functorch_transforms_active():
        return "it has no batching rule for torch.func.vmap"
    if x_BCHW.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {x_BCHW.dtype}"
    if x_BCHW.dim() != 4 or x_BCHW.numel() == 0:
        return "it takes maps [B, C, H, W] that are not empty"
    if fast == "cpp" and x_BCHW.shape[1] % 16:
        return "it takes maps of a multiple of 16 channels"
    if not x_BCHW.is_contiguous(memory_format=torch.channels_last):
        return "it takes channels-last maps"
    return None if stride in (1, 2) else f"it takes a stride of 1 or 2, not {stride}"


def _fake(x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    y = F.max_pool2d(x, 3, stride, 1)
    return y, torch.empty_like(y, dtype=torch.uint8)


def _fake_backward(grad_y: Tensor, taps: Tensor, stride: int, height: int, width: int) -> Tensor:
    shape = (*grad_y.shape[:2], height, width)
    return grad_y.new_empty(shape).contiguous(memory_format=torch.channels_last)


define("max_pool(Tensor x, int stride) -> (Tensor, Tensor)", _fake, "max_pool.max_pool")
define(
    "max_pool_backward(Tensor grad_y, Tensor taps, int stride, int height, int width) -> Tensor",
    _fake_backward,
    "max_pool.max_pool_backward",
)


class MaxPool(torch.autograd.Function):
    """``(impl, stride, x) -> y``, for Triton. The C++'s autograd formula is C++ too (csrc/max_pool.cpp)."""

    @staticmethod
    def forward(ctx: Any, impl: str, stride: int, x: Tensor) -> Tensor:
        y: Tensor
        y, taps = operator("max_pool", impl, x)(x, stride)
        ctx.impl, ctx.stride, ctx.size = impl, stride, x.shape[2:]
        ctx.save_for_backward(taps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (taps,) = ctx.saved_tensors
        call = operator("max_pool_backward", ctx.impl, taps)
        return None, None, call(grad_y, taps, ctx.stride, *ctx.size)
