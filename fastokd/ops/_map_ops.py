"""The operators under the map losses and the fusion step: schemas, and how autograd uses them.

A map's gradient is as large as the map: so an operator gives the loss and only what a backward
needs beside the maps (a number a pixel, or four a sample), and a second operator writes the
gradient, multiplied by the incoming one, in the map's layout and dtype. Maps may have any batch
stride; the Triton form reads any even pixel and channel strides, the C++ one channels-last and
channels-first. All sums are taken in an order that the number of threads doesn't change.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastokd.ops._library import LIBRARY, define

Operator = Callable[..., Any]


def _fp32(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _pixels(x_BCHW: Tensor, asked: bool = True) -> Tensor:
    B, _, H, W = x_BCHW.shape
    return _fp32(x_BCHW, B, H * W) if asked else _fp32(x_BCHW, 0)


def _like(x: Tensor, asked: bool = True) -> Tensor:
    return torch.empty_like(x) if asked else x.new_empty(0)


def _fusion(like: Tensor, K: int) -> Tensor:
    B, _, H, W = like.shape
    return like.new_empty((B, H, W, K)).permute(0, 3, 1, 2)


# The launchers of these operators: kernels/<module>.py, a function of the operator's name.
_SCHEMAS: dict[str, list[tuple[str, Operator]]] = {
    "attention": [
        (
            "attention_map(Tensor x_BCHW) -> (Tensor u_BP, Tensor r_B)",
            lambda x: (_pixels(x), _fp32(x, x.shape[0])),
        ),
        (
            "attention_map_backward(Tensor x_BCHW, Tensor u_BP, Tensor r_B, Tensor grad_BP)"
            " -> Tensor",
            lambda x, u, r, grad: _like(x),
        ),
        (
            "attention_pair(Tensor x_BCHW, Tensor y_BCHW, bool shift, bool need_x, bool need_y)"
            " -> (Tensor loss, Tensor sx_BP, Tensor sy_BP)",
            lambda x, y, shift, need_x, need_y: (_fp32(x), _pixels(x, need_x), _pixels(y, need_y)),
        ),
        (
            "attention_pair_backward(Tensor x_BCHW, Tensor s_BP, Tensor incoming) -> Tensor",
            lambda x, s, incoming: _like(x),
        ),
        ("shifted_map(Tensor y_BCHW) -> Tensor", _like),
    ],
    "feature_transfer": [
        (
            "feature_pair(Tensor x_BCHW, Tensor y_BCHW) -> (Tensor loss, Tensor saved_4B)",
            lambda x, y: (_fp32(x), _fp32(x, 4, x.shape[0])),
        ),
        (
            "feature_pair_backward(Tensor x_BCHW, Tensor y_BCHW, Tensor saved_4B, Tensor incoming,"
            " bool need_x, bool need_y) -> (Tensor, Tensor)",
            lambda x, y, saved, incoming, need_x, need_y: (_like(x, need_x), _like(y, need_y)),
        ),
    ],
    "fusion_step": [
        (
            "fusion_step(Tensor[] maps_BCHW, Tensor weight_K133, Tensor gamma_K, Tensor beta_K,"
            " Tensor(a!) running_mean_K, Tensor(b!) running_var_K, Tensor(c!) num_batches_tracked,"
            " float momentum, float eps) -> (Tensor y_BKHW, Tensor z_BKHW, Tensor saved_2K)",
            lambda maps, weight, *_: (
                _fusion(maps[0], weight.shape[0]),
                _fusion(maps[0], weight.shape[0]),
                _fp32(maps[0], 2, weight.shape[0]),
            ),
        ),
        (
            "fusion_step_backward(Tensor dy_BKHW, Tensor[] maps_BCHW, Tensor weight_K133,"
            " Tensor gamma_K, Tensor beta_K, Tensor z_BKHW, Tensor saved_2K, bool need_maps)"
            " -> (Tensor dweight_K9, Tensor daffine_2K, Tensor dmaps_BKHW)",
            lambda dy, maps, weight, gamma, beta, z, saved, need_maps: (
                _fp32(z, weight.shape[0], 9),
                _fp32(z, 2, weight.shape[0]),
                _like(z, need_maps),
            ),
        ),
    ],
}


def _launcher(module: str, op: str) -> Operator:
    """A Triton launcher; importing it imports triton, so only when it is called."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"fastokd.kernels.{module}"), op)(*args)

    return launch


_LAUNCHERS: dict[str, Operator] = {}
for _module, _schemas in _SCHEMAS.items():
    for _schema, _fake in _schemas:
        _op = _schema.split("(")[0]
        define(_schema, _fake)
        _LAUNCHERS[_op] = _launcher(_module, _op)
        LIBRARY.impl(_op, _LAUNCHERS[_op], "CUDA")


def operator(op: str, interpreted: bool) -> Operator:
    """What computes ``op``: the dispatcher's operator, or Triton's interpreter on the CPU."""
    found: Operator = getattr(torch.ops.fastokd, op).default
    return _LAUNCHERS[op] if interpreted else found


class AttentionMap(torch.autograd.Function):
    """``(interpreted, x) -> n(A(x))``."""

    @staticmethod
    def forward(ctx: Any, interpreted: bool, x_BCHW: Tensor) -> Tensor:
        u_BP, r_B = operator("attention_map", interpreted)(x_BCHW)
        ctx.interpreted = interpreted
        ctx.save_for_backward(x_BCHW, u_BP, r_B)
        return u_BP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BP: Tensor) -> tuple[None, Tensor]:
        return None, operator("attention_map_backward", ctx.interpreted)(
            *ctx.saved_tensors, grad_BP
        )


class AttentionPair(torch.autograd.Function):
    """``(interpreted, shift, x, y) -> loss``: transfer, or diversity where ``shift``."""

    @staticmethod
    def forward(ctx: Any, interpreted: bool, shift: bool, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        need_x, need_y = ctx.needs_input_grad[2], ctx.needs_input_grad[3] and not shift
        loss, sx, sy = operator("attention_pair", interpreted)(
            x_BCHW, y_BCHW, shift, need_x, need_y
        )
        ctx.interpreted = interpreted
        ctx.need = need_x, need_y
        ctx.save_for_backward(x_BCHW if need_x else None, y_BCHW if need_y else None, sx, sy)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, y_BCHW, sx, sy = ctx.saved_tensors
        call = operator("attention_pair_backward", ctx.interpreted)
        dx = call(x_BCHW, sx, incoming) if ctx.need[0] else None
        return None, None, dx, call(y_BCHW, sy, incoming) if ctx.need[1] else None


class FeaturePair(torch.autograd.Function):
    """``(interpreted, x, y) -> loss``."""

    @staticmethod
    def forward(ctx: Any, interpreted: bool, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        loss, saved_4B = operator("feature_pair", interpreted)(x_BCHW, y_BCHW)
        ctx.interpreted = interpreted
        ctx.save_for_backward(x_BCHW, y_BCHW, saved_4B)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[1:]
        dx, dy = operator("feature_pair_backward", ctx.interpreted)(
            *ctx.saved_tensors, incoming, *need
        )
        return None, dx if need[0] else None, dy if need[1] else None


class FusionStep(torch.autograd.Function):
    """``(interpreted, momentum, eps, weight, gamma, beta, three statistics, *maps) -> y``."""

    @staticmethod
    def forward(
        ctx: Any, interpreted: bool, momentum: float, eps: float, *tensors: Tensor
    ) -> Tensor:
        weight, gamma, beta, *statistics = tensors[:6]
        maps = list(tensors[6:])
        y_BKHW, z_BKHW, saved_2K = operator("fusion_step", interpreted)(
            maps, weight, gamma, beta, *statistics, momentum, eps
        )
        ctx.interpreted = interpreted
        ctx.save_for_backward(weight, gamma, beta, z_BKHW, saved_2K, *maps)
        return y_BKHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BKHW: Tensor) -> tuple[Tensor | None, ...]:
        weight, gamma, beta, z_BKHW, saved_2K, *maps = ctx.saved_tensors
        need_maps = any(ctx.needs_input_grad[9:])
        dweight_K9, daffine_2K, dmaps_BKHW = operator("fusion_step_backward", ctx.interpreted)(
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
