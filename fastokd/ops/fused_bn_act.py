"""Training-mode BatchNorm, an optional residual and an optional ReLU as one operation.

For each channel, over the n = B*H*W values x of a batch, with mean m and biased variance v:

    y = relu(weight * (x - m) / sqrt(v + eps) + bias + residual)

    running_mean <- (1 - momentum) running_mean + momentum m
    running_var  <- (1 - momentum) running_var  + momentum v n / (n - 1)
    num_batches_tracked <- num_batches_tracked + 1

that is, ``nn.BatchNorm2d``, ``+`` and ``relu``. Forward reads x twice, backward x and dy twice; the
equations of the backward stand in ``csrc/fused_bn_act_kernel.h``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.errors import UserError
from fastokd.ops._library import define
from fastokd.ops.dispatch import choose

ON_A_GPU = "torch.compile fuses these three on a GPU, so there is no kernel of ours"


def fused_bn_act(
    x_BCHW: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    running_mean_C: Tensor | None,
    running_var_C: Tensor | None,
    num_batches_tracked: Tensor | None,
    *,
    residual_BCHW: Tensor | None = None,
    relu: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    training: bool = True,
    impl: str = "auto",
) -> Tensor:
    """BatchNorm over the batch, plus ``residual_BCHW``, through a ReLU, ``[B, C, H, W]``.

    Args:
        x_BCHW: floating point, of any layout; the C++ takes float32 and bfloat16, channels-last.
        weight_C, bias_C: float32 even where x is bfloat16 (as under autocast), or None.
        running_mean_C, running_var_C: updated in place in training, or None for neither.
        num_batches_tracked: 0-d int64, counted up in place in training, or None.
        residual_BCHW: added before the ReLU; x's shape.
        relu: whether there is a ReLU. As in PyTorch NaN propagates, and the gradient at zero is 0.
        momentum: what the running statistics take of the batch's; None averages over all batches.
        training: False normalises by the running statistics.
        impl: ``"auto"``, ``"torch"`` or ``"cpp"``. Auto takes the C++ on a CPU for training with
            running statistics and a momentum, and PyTorch for all else.

    Returns:
        y, in x's dtype and layout (PyTorch's promotion where the residual has another dtype).
        The C++ form is differentiable once.

    Raises:
        UserError: shapes that don't fit, one value a channel in training, an ``impl`` that can't
            serve the call.
    """
    _check(x_BCHW, weight_C, bias_C, running_mean_C, running_var_C, residual_BCHW, training)
    refusal = None
    if impl != "torch":
        refusal = _cpp_refusal(
            x_BCHW,
            (weight_C, bias_C, running_mean_C, running_var_C),
            num_batches_tracked,
            residual_BCHW,
            momentum,
            training,
        )
    refusals = {"cpp": refusal, "triton": ON_A_GPU}
    if choose("fused_bn_act", impl, x_BCHW.device, refusals) == "cpp":
        state = (weight_C, bias_C, running_mean_C, running_var_C, num_batches_tracked)
        options = (residual_BCHW, relu, momentum, eps)
        fused_BCHW: Tensor = torch.ops.fastokd.fused_bn_act(x_BCHW, *state, *options)[0]
        return fused_BCHW
    # The readable reference: what ``nn.BatchNorm2d``, ``+`` and ``relu`` do.
    average = 0.0 if momentum is None else momentum
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            average = 1.0 / float(num_batches_tracked)  # a read-back, as in nn.BatchNorm2d
    y_BCHW = F.batch_norm(
        x_BCHW,
        running_mean_C,
        running_var_C,
        weight_C,
        bias_C,
        training or running_mean_C is None,
        average,
        eps,
    )
    if residual_BCHW is not None:
        y_BCHW = y_BCHW + residual_BCHW
    return F.relu(y_BCHW) if relu else y_BCHW


def norm_act(
    module: Any, x_BCHW: Tensor, residual_BCHW: Tensor | None, *, impl: str = "auto"
) -> Tensor:
    """``fused_bn_act`` with a ``NormAct``'s state."""
    return fused_bn_act(
        x_BCHW,
        module.weight,
        module.bias,
        module.running_mean,
        module.running_var,
        module.num_batches_tracked,
        residual_BCHW=residual_BCHW,
        relu=module.relu,
        momentum=module.momentum,
        eps=module.eps,
        training=module.training,
        impl=impl,
    )


def norm_impl(impl: str) -> str:
    """The norm's ``impl`` in a step whose losses take ``impl``: the norm has no Triton form."""
    return "auto" if impl == "triton" else impl


def _check(
    x_BCHW: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    running_mean_C: Tensor | None,
    running_var_C: Tensor | None,
    residual_BCHW: Tensor | None,
    training: bool,
) -> None:
    """Raises where shapes or dtypes don't fit."""
    if x_BCHW.dim() != 4 or not x_BCHW.is_floating_point():
        raise UserError(
            f"x_BCHW is {x_BCHW.dtype} of shape {list(x_BCHW.shape)}: "
            "it must be floating point, [batch, channels, height, width]"
        )
    C = x_BCHW.shape[1]
    for vector_C, name in (
        (weight_C, "weight_C"),
        (bias_C, "bias_C"),
        (running_mean_C, "running_mean_C"),
        (running_var_C, "running_var_C"),
    ):
        if vector_C is not None and vector_C.shape != (C,):
            raise UserError(
                f"{name} has shape {list(vector_C.shape)}: it must be [{C}], as x has channels"
            )
    if (running_mean_C is None) != (running_var_C is None):
        raise UserError("one of running_mean_C and running_var_C is None: give both or neither")
    if residual_BCHW is not None and residual_BCHW.shape != x_BCHW.shape:
        raise UserError(
            f"residual_BCHW has shape {list(residual_BCHW.shape)}: it must be x's, "
            f"{list(x_BCHW.shape)}"
        )
    if not C:
        raise UserError(f"x_BCHW has shape {list(x_BCHW.shape)}: it must have a channel")
    if (training or running_mean_C is None) and x_BCHW.numel() == C:
        raise UserError(
            f"x_BCHW has shape {list(x_BCHW.shape)}, one value a channel: BatchNorm needs more in "
            "training, a larger batch for instance"
        )


def _cpp_refusal(
    x_BCHW: Tensor,
    vectors: tuple[Tensor | None, ...],
    num_batches_tracked: Tensor | None,
    residual_BCHW: Tensor | None,
    momentum: float | None,
    training: bool,
) -> str | None:
    """Why the C++ can't take these arguments, or None."""
    if not training:
        return "it is for training, and this is eval mode"
    if momentum is None:
        return "it needs a momentum, and this is a cumulative average"
    dtype = x_BCHW.dtype
    if dtype != torch.bfloat16 and dtype != torch.float32:
        return f"it takes float32 and bfloat16, not {dtype}"
    if not x_BCHW.is_contiguous(memory_format=torch.channels_last) or x_BCHW.numel() == 0:
        return "it takes channels-last maps that are not empty"
    for vector_C in vectors:
        if vector_C is None:
            return "it needs a weight, a bias and running statistics"
        if vector_C.dtype != torch.float32 or not vector_C.is_contiguous():
            return "it needs a weight, a bias and running statistics that are contiguous float32"
    if num_batches_tracked is not None and num_batches_tracked.dtype != torch.int64:
        return f"it counts batches in int64, not {num_batches_tracked.dtype}"
    if residual_BCHW is not None and (
        residual_BCHW.dtype != dtype
        or not residual_BCHW.is_contiguous(memory_format=torch.channels_last)
    ):
        return "it takes a residual of x's dtype in channels-last"
    return None


def _fake(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(4, x.shape[1])


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    stats: Tensor,
    relu: bool,
    want_x: bool,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x) if want_x else x.new_empty(0),
        torch.empty_like(weight),
        torch.empty_like(weight),
        torch.empty_like(x) if want_residual else x.new_empty(0),
    )


# The autograd formula is C++ too (csrc/fused_bn_act.cpp): a network calls this once a layer, and a
# backward in Python takes longer than the smallest layers' arithmetic.
define(
    "fused_bn_act(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
    "Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, Tensor? residual, bool relu, "
    "float momentum, float eps) -> (Tensor, Tensor)",
    _fake,
)
define(
    "fused_bn_act_backward(Tensor grad_y, Tensor x, Tensor? y, Tensor weight, Tensor stats, "
    "bool relu, bool want_x, bool want_residual) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
