"""FFSD's fusion step: students' maps -> depthwise 3x3 -> BatchNorm -> ReLU.

    z_k  = depthwise 3x3 (stride 1, zero padding 1) of channel k of the maps, one after another
    y_k  = ReLU(bn_weight_k (z_k - mean_k) / sqrt(var_k + eps) + bn_bias_k)

with mean and (biased) variance over batch and pixels. The Triton form reads the maps
in place and never builds their concatenation. The 1x1 convolution that follows is a matrix
product and stays torch's. With one map it is the first step of the leader's transfusion, which
needs the map's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastokd.errors import UserError
from fastokd.kernels.layout import even_pixels
from fastokd.ops._library import define, operator
from fastokd.ops._maps import fp32, like
from fastokd.ops.dispatch import choose
from fastokd.ops.fused_bn_act import fused_bn_act

ON_A_CPU = "on a CPU it is left to PyTorch, so there is no kernel of ours"


def fusion_step(
    maps_BCHW: Sequence[Tensor], weight_K133: Tensor, bn: nn.BatchNorm2d, *, impl: str = "auto"
) -> Tensor:
    """Depthwise 3x3 over the maps' concatenated channels, BatchNorm, ReLU.

    Args:
        maps_BCHW: at least one map; channels may differ, batch, pixels and dtype may not.
        weight_K133: ``[K, 1, 3, 3]``, K the sum of the maps' channels.
        bn: of K channels; in training mode its running statistics and ``num_batches_tracked`` are
            updated exactly as its own ``forward`` would.
        impl: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, K, H, W]`` in the maps' dtype, differentiable once in the maps, the weight and the
        norm's affine parameters, each only if it asks.

    Raises:
        UserError: shapes or dtypes that don't fit, fewer than two values a channel in training
            mode, an ``impl`` that can't serve the call.
    """
    _check(maps_BCHW, weight_K133, bn)
    refusals = {"cpp": ON_A_CPU, "triton": _refusal(maps_BCHW, bn)}
    chosen = choose("fusion_step", impl, maps_BCHW[0].device, refusals)
    if chosen != "torch":
        y_BKHW: Tensor = FusionStep.apply(
            chosen,
            bn.momentum,
            bn.eps,
            weight_K133.contiguous(),
            bn.weight,
            bn.bias,
            bn.running_mean,
            bn.running_var,
            bn.num_batches_tracked,
            *maps_BCHW,
        )
        return y_BKHW
    norm = "auto" if impl == "auto" and not maps_BCHW[0].is_cuda else "torch"
    return _torch_impl(maps_BCHW, weight_K133, bn, norm)


def _check(maps_BCHW: Sequence[Tensor], weight_K133: Tensor, bn: nn.BatchNorm2d) -> None:
    """Raises where shapes or dtypes don't fit; reads no values."""
    if not maps_BCHW:
        raise UserError("maps_BCHW is empty: give at least one map")
    first = maps_BCHW[0]
    if first.dim() != 4 or not first.is_floating_point():
        raise UserError(
            f"maps_BCHW[0] is {first.dtype} of shape {list(first.shape)}: "
            "it must be floating point, [batch, channels, height, width]"
        )
    B, _, H, W = first.shape
    for index, x_BCHW in enumerate(maps_BCHW[1:], start=1):
        fits = x_BCHW.dim() == 4 and (x_BCHW.shape[0], *x_BCHW.shape[2:]) == (B, H, W)
        if not fits or x_BCHW.dtype != first.dtype:
            raise UserError(
                f"maps_BCHW[{index}] is {x_BCHW.dtype} of shape {list(x_BCHW.shape)}: it must be "
                f"{first.dtype}, [{B}, channels, {H}, {W}], as the first map"
            )
    K = sum(x_BCHW.shape[1] for x_BCHW in maps_BCHW)
    if not K * H * W:
        raise UserError(f"maps_BCHW[0] has shape {list(first.shape)}: give maps that are not empty")
    if weight_K133.shape != (K, 1, 3, 3):
        raise UserError(
            f"weight_K133 has shape {list(weight_K133.shape)}: "
            f"it must be [{K}, 1, 3, 3] for maps of {K} channels together"
        )
    if bn.num_features != K:
        raise UserError(f"bn has {bn.num_features} channels: it must have {K}, as the maps do")
    if bn.training and B * H * W < 2:
        raise UserError(
            f"the maps hold {B * H * W} values a channel: BatchNorm needs at least 2 in training "
            "mode; use a larger batch"
        )


def _refusal(maps_BCHW: Sequence[Tensor], bn: nn.BatchNorm2d) -> str | None:
    """Why the Triton form can't take these arguments, or None."""
    first = maps_BCHW[0]
    C = first.shape[1]
    if not bn.training:
        return "it is for training, and the norm is in eval mode"
    tracked = bn.track_running_stats and bn.running_mean is not None
    if bn.momentum is None or not tracked or bn.weight is None:
        return "it needs a norm with weights, running statistics and a momentum"
    assert bn.running_mean is not None
    if first.dtype == torch.float64:
        return "float64 is for impl='torch'"
    if bn.weight.dtype != torch.float32 or bn.running_mean.dtype != torch.float32:
        return "it needs a norm in float32"
    if any(x.stride() != first.stride() or x.shape[1] != C for x in maps_BCHW):
        return "the maps differ in width or layout"
    if (C > 1 and first.stride(1) != 1) or not even_pixels(first):
        return "the maps are not channels-last"
    return None


def _torch_impl(
    maps_BCHW: Sequence[Tensor], weight_K133: Tensor, bn: nn.BatchNorm2d, norm: str = "torch"
) -> Tensor:
    """The readable reference, in the maps' dtype; ``norm``: the implementation of BatchNorm and ReLU."""
    x_BKHW = maps_BCHW[0] if len(maps_BCHW) == 1 else torch.cat(tuple(maps_BCHW), dim=1)
    weight_K133 = weight_K133.to(x_BKHW.dtype)
    # Through a view, so that the gradient has a dense weight's strides, which DDP's buckets expect.
    weight_K133 = weight_K133.reshape(-1, 9).view(-1, 1, 3, 3)
    z_BKHW = F.conv2d(x_BKHW, weight_K133, padding=1, groups=weight_K133.shape[0])
    if norm != "torch" and (bn.track_running_stats or not bn.training):
        state = (bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.num_batches_tracked)
        return fused_bn_act(
            z_BKHW, *state, momentum=bn.momentum, eps=bn.eps, training=bn.training, impl=norm
        )
    # The class's own forward: a subclass may add an activation of its own.
    return F.relu(nn.BatchNorm2d.forward(bn, z_BKHW))


def _result(like: Tensor, K: int) -> Tensor:
    B, _, H, W = like.shape
    return like.new_empty((B, H, W, K)).permute(0, 3, 1, 2)


define(
    "fusion_step(Tensor[] maps_BCHW, Tensor weight_K133, Tensor gamma_K, Tensor beta_K,"
    " Tensor(a!) running_mean_K, Tensor(b!) running_var_K, Tensor(c!) num_batches_tracked,"
    " float momentum, float eps) -> (Tensor y_BKHW, Tensor z_BKHW, Tensor saved_2K)",
    lambda maps, weight, *_: (
        _result(maps[0], weight.shape[0]),
        _result(maps[0], weight.shape[0]),
        fp32(maps[0], 2, weight.shape[0]),
    ),
    "fusion_step.fusion_step",
)
define(
    "fusion_step_backward(Tensor dy_BKHW, Tensor[] maps_BCHW, Tensor weight_K133,"
    " Tensor gamma_K, Tensor beta_K, Tensor z_BKHW, Tensor saved_2K, bool need_maps)"
    " -> (Tensor dweight_K9, Tensor daffine_2K, Tensor dmaps_BKHW)",
    lambda dy, maps, weight, gamma, beta, z, saved, need_maps: (
        fp32(z, weight.shape[0], 9),
        fp32(z, 2, weight.shape[0]),
        like(z, need_maps),
    ),
    "fusion_step.fusion_step_backward",
)


class FusionStep(torch.autograd.Function):
    """``(impl, momentum, eps, weight, gamma, beta, three statistics, *maps) -> y``."""

    @staticmethod
    def forward(ctx: Any, impl: str, momentum: float, eps: float, *tensors: Tensor) -> Tensor:
        weight, gamma, beta, *statistics = tensors[:6]
        maps = list(tensors[6:])
        y_BKHW, z_BKHW, saved_2K = operator("fusion_step", impl, weight)(
            maps, weight, gamma, beta, *statistics, momentum, eps
        )
        ctx.impl = impl
        ctx.save_for_backward(weight, gamma, beta, z_BKHW, saved_2K, *maps)
        return y_BKHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BKHW: Tensor) -> tuple[Tensor | None, ...]:
        weight, gamma, beta, z_BKHW, saved_2K, *maps = ctx.saved_tensors
        need_maps = any(ctx.needs_input_grad[9:])
        dweight_K9, daffine_2K, dmaps_BKHW = operator("fusion_step_backward", ctx.impl, weight)(
            dy_BKHW, maps, weight, gamma, beta, z_BKHW, saved_2K, need_maps
        )
        dmaps = dmaps_BKHW.split([x.shape[1] for x in maps], 1) if need_maps else [None] * len(maps)
        return (
            *(None, None, None),
            dweight_K9.view(weight.shape).to(weight.dtype),
            daffine_2K[0].to(gamma.dtype),
            daffine_2K[1].to(beta.dtype),
            *(None, None, None),
            *dmaps,
        )
