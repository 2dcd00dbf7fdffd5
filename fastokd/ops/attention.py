"""FFSD's attention on stage maps: maps, transfer, diversity and shifted maps.

For a map x of C channels and HW pixels:

    A(x)  = mean_c x_c^2, flattened                              [B, HW]
    n(v)  = v / max(||v||_2, 1e-12), per sample
    attention_map(x)          = n(A(x))
    attention_transfer(x, y)  = mse(n(A(x)), n(A(y)))
    target(y) = (r/2 - a) sign(a - threshold) + r/2              a = n(A(y)), r = ||A(y)||_2,
                threshold = the largest of the floor(HW / 3) smallest entries of a, sign(0) = 0
    attention_diversity(x, y) = mse(n(A(x)), target(y))          gradient in x alone
    shifted_map(y)            = y + (target(y) - a) r / C        no gradient

``target`` mixes the raw norm with normalised values, as the published code does. The four share
these definitions and so one file (whole maps need none of them: ``feature_transfer.py``); `mse` is the mean over all elements. Arithmetic is fp32 for fp32, bf16 and
fp16 maps and float64 where a map is float64; gradients come back in each map's own dtype. An empty
batch gives a loss of 0.

A map's gradient is as large as the map. So an operator returns the loss and only what a backward
needs beside the maps, a number a pixel, and a second operator writes the gradient, multiplied by
the incoming one, in the map's layout and dtype. Maps may have any batch stride; the Triton form
reads any even pixel and channel strides, the C++ one channels-last and channels-first. Sums are
taken in an order that doesn't depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastokd.ops._library import define, operator
from fastokd.ops._maps import (
    EPS,
    arithmetic,
    attention_refusals,
    check_map,
    check_pair,
    fp32,
    like,
    mse,
    normalised,
)
from fastokd.ops.dispatch import choose


def attention_map(maps_BCHW: Tensor, *, impl: str = "auto") -> Tensor:
    """n(A(x)): the channel mean of squares, L2-normalised per sample.

    Args:
        maps_BCHW: floating point, H * W at least 3.
        impl: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``.

    Returns:
        ``[B, H * W]`` in fp32 (float64 for float64); a map of zeros gives zeros.

    Raises:
        UserError: a shape or dtype that doesn't fit, an ``impl`` that can't serve the call.
    """
    check_map("maps_BCHW", maps_BCHW, pixels=3)
    chosen = _choose("attention_map", impl, maps_BCHW)
    if chosen != "torch":
        return AttentionMap.apply(chosen, maps_BCHW)
    return normalised(_energy(maps_BCHW, arithmetic(maps_BCHW)))


def attention_transfer(student_BCHW: Tensor, other_BCHW: Tensor, *, impl: str = "auto") -> Tensor:
    """mse(n(A(student)), n(A(other))), a scalar in fp32 (float64 for float64).

    Differentiable once in both maps; a caller detaches what it only compares with. The maps may
    have different channels and dtypes, not different pixels. Raises as :func:`attention_map` does.
    """
    check_map("student_BCHW", student_BCHW, pixels=3)
    check_pair(student_BCHW, other_BCHW, channels=False)
    chosen = _choose("attention_transfer", impl, student_BCHW, other_BCHW)
    if chosen != "torch":
        return AttentionPair.apply(chosen, False, student_BCHW, other_BCHW)
    dtype = arithmetic(student_BCHW, other_BCHW)
    return mse(normalised(_energy(student_BCHW, dtype)), normalised(_energy(other_BCHW, dtype)))


def attention_diversity(student_BCHW: Tensor, other_BCHW: Tensor, *, impl: str = "auto") -> Tensor:
    """mse(n(A(student)), target(other)), a scalar in fp32 (float64 for float64).

    The gradient goes to the student's map alone. Shapes, dtypes and errors as for
    :func:`attention_transfer`.
    """
    check_map("student_BCHW", student_BCHW, pixels=3)
    check_pair(student_BCHW, other_BCHW, channels=False)
    chosen = _choose("attention_diversity", impl, student_BCHW, other_BCHW)
    if chosen != "torch":
        return AttentionPair.apply(chosen, True, student_BCHW, other_BCHW.detach())
    dtype = arithmetic(student_BCHW, other_BCHW)
    a_BP = normalised(_energy(student_BCHW, dtype))
    with torch.no_grad():
        _, target_BP, _ = _target(other_BCHW, dtype)
    return mse(a_BP, target_BP)


@torch.no_grad()
def shifted_map(other_BCHW: Tensor, *, impl: str = "auto") -> Tensor:
    """other + (target(other) - n(A(other))) ||A(other)|| / C, the same for every channel.

    Returns a map of the input's shape and dtype, without gradient. Raises as
    :func:`attention_map` does.
    """
    check_map("other_BCHW", other_BCHW, pixels=3)
    chosen = _choose("shifted_map", impl, other_BCHW)
    if chosen != "torch":
        shifted_BCHW: Tensor = operator("shifted_map", chosen, other_BCHW)(other_BCHW)
        return shifted_BCHW
    dtype = arithmetic(other_BCHW)
    a_BP, target_BP, r_B1 = _target(other_BCHW, dtype)
    B, C, H, W = other_BCHW.shape
    shift_B1HW = ((target_BP - a_BP) * r_B1 / C).view(B, 1, H, W)
    return (other_BCHW.to(dtype) + shift_B1HW).to(other_BCHW.dtype)


def _choose(op: str, impl: str, *maps: Tensor) -> str:
    return choose(op, impl, maps[0].device, {} if impl == "torch" else attention_refusals(*maps))


def _energy(maps_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """A(x), ``[B, HW]``."""
    return maps_BCHW.to(dtype).square().mean(1).flatten(1)


def _target(other_BCHW: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """a = n(A(y)), target(y) and r, ``[B, HW]`` twice and ``[B, 1]``."""
    energy_BP = _energy(other_BCHW, dtype)
    r_B1 = torch.linalg.vector_norm(energy_BP, dim=1, keepdim=True)
    a_BP = energy_BP / r_B1.clamp_min(EPS)
    threshold_B1 = a_BP.kthvalue(a_BP.shape[1] // 3, dim=1, keepdim=True).values
    half_B1 = r_B1 / 2
    return a_BP, (half_B1 - a_BP) * torch.sign(a_BP - threshold_B1) + half_B1, r_B1


def _pixels(x_BCHW: Tensor, asked: bool = True) -> Tensor:
    B, _, H, W = x_BCHW.shape
    return fp32(x_BCHW, B, H * W) if asked else fp32(x_BCHW, 0)


define(
    "attention_map(Tensor x_BCHW) -> (Tensor u_BP, Tensor r_B)",
    lambda x: (_pixels(x), fp32(x, x.shape[0])),
    "attention.attention_map",
)
define(
    "attention_map_backward(Tensor x_BCHW, Tensor u_BP, Tensor r_B, Tensor grad_BP) -> Tensor",
    lambda x, u, r, grad: like(x),
    "attention.attention_map_backward",
)
define(
    "attention_pair(Tensor x_BCHW, Tensor y_BCHW, bool shift, bool need_x, bool need_y)"
    " -> (Tensor loss, Tensor sx_BP, Tensor sy_BP)",
    lambda x, y, shift, need_x, need_y: (fp32(x), _pixels(x, need_x), _pixels(y, need_y)),
    "attention.attention_pair",
)
define(
    "attention_pair_backward(Tensor x_BCHW, Tensor s_BP, Tensor incoming) -> Tensor",
    lambda x, s, incoming: like(x),
    "attention.attention_pair_backward",
)
define("shifted_map(Tensor y_BCHW) -> Tensor", like, "attention.shifted_map")


class AttentionMap(torch.autograd.Function):
    """``(impl, x) -> n(A(x))``."""

    @staticmethod
    def forward(ctx: Any, impl: str, x_BCHW: Tensor) -> Tensor:
        u_BP, r_B = operator("attention_map", impl, x_BCHW)(x_BCHW)
        ctx.impl = impl
        ctx.save_for_backward(x_BCHW, u_BP, r_B)
        return u_BP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BP: Tensor) -> tuple[None, Tensor]:
        call = operator("attention_map_backward", ctx.impl, grad_BP)
        return None, call(*ctx.saved_tensors, grad_BP)


class AttentionPair(torch.autograd.Function):
    """``(impl, shift, x, y) -> loss``: transfer, or diversity where ``shift``."""

    @staticmethod
    def forward(ctx: Any, impl: str, shift: bool, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        need_x, need_y = ctx.needs_input_grad[2], ctx.needs_input_grad[3] and not shift
        call = operator("attention_pair", impl, x_BCHW)
        loss, sx, sy = call(x_BCHW, y_BCHW, shift, need_x, need_y)
        ctx.impl = impl
        ctx.need = need_x, need_y
        ctx.save_for_backward(x_BCHW if need_x else None, y_BCHW if need_y else None, sx, sy)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, y_BCHW, sx, sy = ctx.saved_tensors
        call = operator("attention_pair_backward", ctx.impl, incoming)
        dx = call(x_BCHW, sx, incoming) if ctx.need[0] else None
        return None, None, dx, call(y_BCHW, sy, incoming) if ctx.need[1] else None
