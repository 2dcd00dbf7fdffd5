"""FFSD's fusion step: students' maps -> depthwise 3x3 -> BatchNorm -> ReLU.

    z_k  = depthwise 3x3 (stride 1, zero padding 1) of channel k of the maps, one after another
    y_k  = ReLU(bn_weight_k (z_k - mean_k) / sqrt(var_k + eps) + bn_bias_k)

with mean and (biased) variance over batch and pixels. The maps are read where the cohort left them:
their concatenation is never built by the fast paths. The 1x1 convolution that follows is a matrix
product and stays torch's. With one map the same step opens the leader's transfusion, which needs
the map's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.errors import UserError
from fastokd.kernels._maps import even_pixels
from fastokd.ops._dispatch import choose
from fastokd.ops._map_ops import FusionStep


def fusion_step(
    maps_BCHW: Sequence[Tensor], weight_K133: Tensor, bn: nn.BatchNorm2d, *, impl: str = "auto"
) -> Tensor:
    """Depthwise 3x3 over the maps' concatenated channels, BatchNorm, ReLU.

    Args:
        maps_BCHW: at least one map; channels may differ, batch, pixels and dtype may not.
        weight_K133: ``[K, 1, 3, 3]``, K the sum of the maps' channels.
        bn: of K channels; in training mode its running statistics and ``num_batches_tracked`` are
            updated exactly as its own ``forward`` would.
        impl: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``.

    Returns:
        ``[B, K, H, W]`` in the maps' dtype, differentiable once in the maps, the weight and the
        norm's affine parameters, each only if it asks.

    Raises:
        UserError: shapes or dtypes that don't fit, fewer than two values a channel in training
            mode, an ``impl`` that can't serve the call.
    """
    _check(maps_BCHW, weight_K133, bn)
    device = maps_BCHW[0].device
    refusals = {} if impl == "torch" else _refusals(maps_BCHW, bn)
    chosen = choose("fusion_step", impl, device, refusals)
    if chosen != "torch":
        y_BKHW: Tensor = FusionStep.apply(
            chosen == "triton" and device.type != "cuda",
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
    return _torch_impl(maps_BCHW, weight_K133, bn)


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


def _refusals(maps_BCHW: Sequence[Tensor], bn: nn.BatchNorm2d) -> dict[str, str | None]:
    """Why the fast forms can't take these arguments."""
    first = maps_BCHW[0]
    C = first.shape[1]
    reason = None
    if not bn.training:
        reason = "it is for training, and the norm is in eval mode"
    elif bn.momentum is None or bn.running_mean is None or bn.weight is None:
        reason = "it needs a norm with weights, running statistics and a momentum"
    elif first.dtype == torch.float64:
        reason = "float64 is for impl='torch'"
    elif bn.weight.dtype != torch.float32 or bn.running_mean.dtype != torch.float32:
        reason = "it needs a norm in float32"
    elif any(x.stride() != first.stride() or x.shape[1] != C for x in maps_BCHW):
        reason = "the maps differ in width or layout"
    elif (C > 1 and first.stride(1) != 1) or not even_pixels(first):
        reason = "the maps are not channels-last"
    return {"cpp": reason, "triton": reason}


def _torch_impl(maps_BCHW: Sequence[Tensor], weight_K133: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """The readable reference, in the maps' dtype."""
    x_BKHW = maps_BCHW[0] if len(maps_BCHW) == 1 else torch.cat(tuple(maps_BCHW), dim=1)
    weight_K133 = weight_K133.to(x_BKHW.dtype)
    z_BKHW = F.conv2d(x_BKHW, weight_K133, padding=1, groups=weight_K133.shape[0])
    # The class's own forward: a subclass may add an activation of its own.
    return F.relu(nn.BatchNorm2d.forward(bn, z_BKHW))
