"""Convolutions in bfloat16 on a CPU with AVX-512 BF16, where they are faster than torch's.

Forward and the gradient of the input, of 3x3 layers with padding 1 whose rows are a multiple of 8
long, are computed here where few channels are read (at stride 1 at most 64, at stride 2 where half
of a small L2 cache holds the weight); for other layers by torch. The gradient of the weight,

    grad_w[o, c, i, j] = sum over b, h, w of grad_y[b, o, h, w] x[b, c, h s + i - p, w s + j - p]

is computed here for every layer that :func:`suits`; it is summed and returned in float32, while torch
rounds it to bfloat16.

The C++ is differentiable once, and not by ``torch.func``'s transforms; use ``impl="torch"`` for more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.ops import cpp
from fastokd.ops._library import define
from fastokd.ops.dispatch import unavailable


def suits(conv: nn.Conv2d) -> bool:
    """Whether the layer is one that the C++ takes, wherever it runs."""
    kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
    square = isinstance(padding, tuple) and len({*kernel}) == len({*stride}) == len({*padding}) == 1
    return (
        square
        and kernel[0] in (1, 3)
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.in_channels % 16 == conv.out_channels % 16 == 0
    )


def conv2d(
    x_BCHW: Tensor,
    weight_OCKK: Tensor,
    bias_O: Tensor | None,
    stride: int,
    padding: int,
    *,
    impl: str = "auto",
) -> Tensor:
    """``F.conv2d`` of a layer that :func:`suits`; the C++ where it can serve.

    ``x_BCHW``: ``[B, C, H, W]``; ``weight_OCKK``: float32 (as under autocast) or x's dtype. The C++
    takes bfloat16 in channels-last, in training.
    """
    if impl == "torch" or not _fast(x_BCHW, weight_OCKK):
        return F.conv2d(x_BCHW, weight_OCKK, bias_O, stride, padding)
    y_BCHW: Tensor = torch.ops.fastokd.conv2d(x_BCHW, weight_OCKK, stride, padding)
    return y_BCHW if bias_O is None else y_BCHW + bias_O.to(y_BCHW.dtype)[:, None, None]


def conv_transpose2d(x_BCHW: Tensor, weight_CO33: Tensor, *, impl: str = "auto") -> Tensor:
    """``F.conv_transpose2d`` of a 3x3 kernel to ``[B, O, 2 H, 2 W]``; the C++ where it can serve.

    ``x_BCHW``: ``[B, C, H, W]``; ``weight_CO33``: float32 (as under autocast) or x's dtype. The C++
    takes bfloat16 in channels-last, channels that are multiples of 16.
    """
    if impl == "torch" or not _takes(x_BCHW, weight_CO33):
        return F.conv_transpose2d(x_BCHW, weight_CO33, None, 2, 1, 1)
    y_BOHW: Tensor = torch.ops.fastokd.conv_transpose2d(x_BCHW, weight_CO33)
    return y_BOHW


def _fast(x_BCHW: Tensor, weight_OCKK: Tensor) -> bool:
    return torch.is_grad_enabled() and weight_OCKK.requires_grad and _takes(x_BCHW, weight_OCKK)


def _takes(x_BCHW: Tensor, weight: Tensor) -> bool:
    return (
        x_BCHW.dtype == torch.bfloat16
        and weight.shape[0] % 16 == weight.shape[1] % 16 == 0
        and x_BCHW.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and x_BCHW.is_contiguous(memory_format=torch.channels_last)
        and unavailable("cpp", x_BCHW.device) is None
        and cpp.capability() == "avx512bf16"
    )


def _fake(grad_y: Tensor, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    shape = (grad_y.shape[1], kernel, kernel, x.shape[1])
    return x.new_empty(shape, dtype=torch.float32).permute(0, 3, 1, 2)


def _fake_transpose(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv_transpose2d(x, weight.to(x.dtype), None, 2, 1, 1)


def _fake_conv(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    return F.conv2d(x, weight.to(x.dtype), None, stride, padding)


# Their autograd formulas are C++ too (csrc/conv.cpp), since a network calls them once a layer.
define("conv_transpose2d(Tensor x, Tensor weight) -> Tensor", _fake_transpose)
define("conv2d(Tensor x, Tensor weight, int stride, int padding) -> Tensor", _fake_conv)
define(
    "conv_weight_grad(Tensor grad_y, Tensor x, int kernel, int stride, int padding) -> Tensor",
    _fake,
)
