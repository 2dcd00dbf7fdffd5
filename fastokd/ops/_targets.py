"""What the divergences of students from a target share: checks, refusals, the autograd formula.

Their operators take a stack of students ``[S, B, C]`` and a target ``[1, B, C]`` for all of them or
``[S, B, C]``, and return the batch mean of each student, ``[S]``, with the gradient for an incoming
gradient of 1. Targets carry no gradient. Loss, arithmetic and that gradient are fp32: the backward multiplies
it by each student's incoming one and rounds once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastokd.errors import UserError
from fastokd.ops._library import operator
from fastokd.ops.dispatch import choose


def target_loss(
    op: str,
    impl: str,
    reference: Callable[..., Tensor],
    logits_SBC: Tensor,
    target_SBC: Tensor,
    *args: Any,
) -> Tensor:
    """Each student's loss ``[S]`` by the operator ``op`` or by ``reference``, which take ``args`` too."""
    target_SBC = target_SBC.detach()
    reason = _refusal(logits_SBC, target_SBC)
    impl = choose(op, impl, logits_SBC.device, {"cpp": reason, "triton": reason})
    if impl != "torch":
        loss_S: Tensor = TargetLoss.apply(op, impl, logits_SBC, target_SBC, *args)
        return loss_S
    double = torch.float64 in (logits_SBC.dtype, target_SBC.dtype)
    dtype = torch.float64 if double else torch.float32
    with torch.autocast(logits_SBC.device.type, enabled=False):
        return reference(logits_SBC.to(dtype), target_SBC.to(dtype), *args)


def stacked(logits_BC: Tensor, target_logits_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Both as stacks of one; raises where they aren't ``[batch, classes]``."""
    for name, x in (("logits_BC", logits_BC), ("target_logits_BC", target_logits_BC)):
        if x.dim() != 2:
            raise UserError(f"{name} has shape {list(x.shape)}: it must be [batch, classes]")
    return logits_BC[None], target_logits_BC[None]


def check(logits_SBC: Tensor, target_SBC: Tensor, classes: int, **numbers: float) -> None:
    """Raises where the arguments don't fit; reads no tensor's values. ``classes``: at least as many."""
    given, shape = logits_SBC.shape, target_SBC.shape
    if len(given) != 3 or not logits_SBC.is_floating_point() or not given[0] or given[2] < classes:
        raise UserError(
            f"the logits are {logits_SBC.dtype} of shape {list(given)}: they must be floating point, "
            f"[batch, classes], of at least {classes} class{'es' if classes > 1 else ''}"
        )
    if shape not in (given, (1, *given[1:])) or not target_SBC.is_floating_point():
        raise UserError(
            f"the target's logits are {target_SBC.dtype} of shape {list(shape[1:])}: they must be "
            f"floating point, {list(given[1:])}, as the student's logits"
        )
    if target_SBC.device != logits_SBC.device:
        raise UserError(
            f"the target's logits are on {target_SBC.device} and the student's on {logits_SBC.device}: "
            "move one to the other's device"
        )
    for name, value in numbers.items():
        if not isinstance(value, Real):
            what = "tensor" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{name} is a {what}: give a Python number, such as 2.0")
        if not math.isfinite(value):
            raise UserError(f"{name} is {value}: it must be a finite number")
    if numbers["temperature"] <= 0:
        raise UserError(
            f"temperature is {numbers['temperature']}: it must be a finite number above 0"
        )


def _refusal(logits_SBC: Tensor, target_SBC: Tensor) -> str | None:
    """Why the fused forms can't read these logits, or None."""
    for x_SBC in (logits_SBC, target_SBC):
        if x_SBC.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{str(x_SBC.dtype).removeprefix('torch.')} is for impl='torch'"
        if x_SBC.stride(2) != 1 and x_SBC.shape[2] > 1:
            return f"neighbouring classes are {x_SBC.stride(2)} elements apart, not 1"
    return None


def fake(logits_SBC: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The results on fake tensors; ``args`` end in whether the gradient is asked for."""
    shape = logits_SBC.shape if args[-1] else (0,)
    return (
        logits_SBC.new_empty(logits_SBC.shape[0], dtype=torch.float32),
        logits_SBC.new_empty(shape, dtype=torch.float32),
    )


class TargetLoss(torch.autograd.Function):
    """``(op, impl, logits, target, arguments...) -> loss_S``."""

    @staticmethod
    def forward(ctx: Any, op: str, impl: str, logits_SBC: Tensor, *args: Any) -> Tensor:
        call = operator(op, impl, logits_SBC)
        loss_S, gradient_SBC = call(logits_SBC, *args, ctx.needs_input_grad[2])
        ctx.save_for_backward(gradient_SBC)
        ctx.dtype, ctx.arguments = logits_SBC.dtype, len(args)
        result: Tensor = loss_S
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming_S: Tensor) -> tuple[Tensor | None, ...]:
        saved_SBC, incoming_SBC = ctx.saved_tensors[0], incoming_S[:, None, None]
        if torch.compiler.is_compiling():
            gradient_SBC = (saved_SBC * incoming_SBC).to(ctx.dtype)
        else:  # one launch
            gradient_SBC = torch.empty_like(saved_SBC, dtype=ctx.dtype)
            torch.mul(saved_SBC, incoming_SBC, out=gradient_SBC)
        return None, None, gradient_SBC, *(None,) * ctx.arguments
