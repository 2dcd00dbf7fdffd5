"""FFSD's transfer of whole maps: mse(n(x), n(y)).

A sample's channels and pixels are one vector, n(v) = v / max(||v||_2, 1e-12), `mse` the mean over
all elements of the batch. Arithmetic is fp32 for fp32, bf16 and fp16 maps and float64 where a map
is float64; gradients come back in each map's own dtype. An empty batch gives 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastokd.kernels.layout import dense, in_rows
from fastokd.ops._library import define, operator
from fastokd.ops._maps import arithmetic, check_map, check_pair, fp32, like, mse, normalised
from fastokd.ops.dispatch import choose


def feature_transfer(student_BCHW: Tensor, other_BCHW: Tensor, *, impl: str = "auto") -> Tensor:
    """mse(n(student), n(other)) over whole maps, a scalar in fp32 (float64 for float64).

    Differentiable once in both maps, which have one shape.

    Args:
        student_BCHW, other_BCHW: floating point; their dtypes may differ.
        impl: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``.

    Raises:
        UserError: a shape or dtype that doesn't fit, an ``impl`` that can't serve the call.
    """
    check_map("student_BCHW", student_BCHW, pixels=1)
    check_pair(student_BCHW, other_BCHW, channels=True)
    refusals = {} if impl == "torch" else _refusals(student_BCHW, other_BCHW)
    chosen = choose("feature_transfer", impl, student_BCHW.device, refusals)
    if chosen != "torch":
        return FeaturePair.apply(chosen, student_BCHW, other_BCHW)
    dtype = arithmetic(student_BCHW, other_BCHW)
    return mse(
        normalised(student_BCHW.to(dtype).flatten(1)), normalised(other_BCHW.to(dtype).flatten(1))
    )


def _refusals(student_BCHW: Tensor, other_BCHW: Tensor) -> dict[str, str | None]:
    """Why the C++ and the Triton form can't read these maps."""
    cpp = triton = None
    if torch.float64 in (student_BCHW.dtype, other_BCHW.dtype):
        cpp = triton = "float64 is for impl='torch'"
    elif student_BCHW.dtype != other_BCHW.dtype:
        cpp = triton = "the maps have different dtypes"
    elif not dense(student_BCHW, other_BCHW):
        cpp = "the maps' samples are not dense in one order"
        if not (in_rows(student_BCHW) and in_rows(other_BCHW)):
            triton = "the maps' samples are neither dense in one order nor both channels-last"
    return {"cpp": cpp, "triton": triton}


define(
    "feature_pair(Tensor x_BCHW, Tensor y_BCHW) -> (Tensor loss, Tensor saved_4B)",
    lambda x, y: (fp32(x), fp32(x, 4, x.shape[0])),
    "feature_transfer.feature_pair",
)
define(
    "feature_pair_backward(Tensor x_BCHW, Tensor y_BCHW, Tensor saved_4B, Tensor incoming,"
    " bool need_x, bool need_y) -> (Tensor, Tensor)",
    lambda x, y, saved, incoming, need_x, need_y: (like(x, need_x), like(y, need_y)),
    "feature_transfer.feature_pair_backward",
)


class FeaturePair(torch.autograd.Function):
    """``(impl, x, y) -> loss``."""

    @staticmethod
    def forward(ctx: Any, impl: str, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        loss, saved_4B = operator("feature_pair", impl, x_BCHW)(x_BCHW, y_BCHW)
        ctx.impl = impl
        ctx.save_for_backward(x_BCHW, y_BCHW, saved_4B)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[1:]
        call = operator("feature_pair_backward", ctx.impl, incoming)
        dx, dy = call(*ctx.saved_tensors, incoming, *need)
        return None, dx if need[0] else None, dy if need[1] else None
