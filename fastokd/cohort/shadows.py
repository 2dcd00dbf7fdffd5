"""The copies of a student's weights that autocast would make, made together.

Autocast casts each weight of a convolution or linear layer when it is first used, and the backward
casts each gradient: two launches a weight, of a few microseconds of GPU time together. Here the
weights of a student are cast by one multi-tensor copy, and their gradients by another. The values are
autocast's. The parameters stay the leaves, in float32: they get the gradients, and optimizers, DDP's
hooks and state dicts see nothing else.

A student's gradients arrive together, at the end of its backward. So under DDP the all-reduces of a
student overlap the backward of the students after it, not its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.cohort.layers import OpConv2d, is_exactly, is_ours
from fastokd.cohort.stacks import Stack
from fastokd.models import Student

# A layer, and the name of one of its parameters.
Site = tuple[nn.Module, str]


def sites_of(*students: Student) -> list[Site]:
    """Where the students' convolutions and linear layers have their weights.

    A student with code of another library or of the user is left to autocast: that code may read or
    change a weight.
    """
    return [
        (layer, name)
        for student in students
        if all(is_ours(module) for module in student.modules() if list(module.children()))
        for layer in student.modules()
        if is_exactly(layer, nn.Conv2d, OpConv2d, nn.Linear)
        for name, _ in layer.named_parameters(recurse=False)
    ]


def narrowed(sites: Sequence[Site]) -> AbstractContextManager[None]:
    """Within it the layers hold their weights in the dtype that autocast computes in."""
    dtype = target(sites)
    return nullcontext() if dtype is None else _swapped(sites, dtype)


def target(sites: Sequence[Site]) -> torch.dtype | None:
    """What the weights are cast to here, or None where that is left to autocast.

    The compiler fuses casts, a CPU's C++ reads float32 weights, and ``Cast`` has no rules for
    ``torch.func``.
    """
    if not sites or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    layer, name = sites[0]
    weight = layer._parameters[name]
    assert weight is not None
    kind = weight.device.type
    if weight.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return None
    if kind == "cpu" and any(isinstance(x, OpConv2d) and x.impl != "torch" for x, _ in sites):
        return None
    return torch.get_autocast_dtype(kind)


@contextmanager
def _swapped(sites: Sequence[Site], dtype: torch.dtype) -> Iterator[None]:
    """Puts copies in ``dtype`` into the layers' tables of parameters, and the parameters back."""
    own = [layer._parameters[name] for layer, name in sites]
    weights = list({id(x): x for x in own if x is not None}.values())  # a tied one once
    shadows: dict[int, Any] = {
        id(x): shadow for x, shadow in zip(weights, Cast.apply(dtype, *weights), strict=True)
    }
    try:
        for (layer, name), x in zip(sites, own, strict=True):
            layer._parameters[name] = shadows[id(x)]
        yield
    finally:
        for (layer, name), x in zip(sites, own, strict=True):
            layer._parameters[name] = x


@contextmanager
def shadowed(sites: Sequence[Site], stacks: Sequence[Stack]) -> Iterator[None]:
    """Within it the stacks of the students' ``sites`` are in the dtype that autocast computes in."""
    dtype = target(sites)
    if dtype is not None:
        shadows = Cast.apply(dtype, *(stack() for stack in stacks))
        for stack, shadow in zip(stacks, shadows, strict=True):
            stack.shadow = shadow
    try:
        yield
    finally:
        for stack in stacks:
            stack.shadow = None


class Cast(torch.autograd.Function):
    """``(dtype, *weights) -> *shadows`` in ``dtype``; gradients come back in the weights' dtype."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        shadows = [torch.empty_like(x, dtype=dtype) for x in weights]
        torch._foreach_copy_(shadows, weights)
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(
            *(x for x, need in zip(shadows, needed, strict=True) if not need)
        )
        return tuple(shadows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [x for x in grads if x is not None]
        # With the gradients' strides: else the copy isn't one launch.
        wide = [torch.empty_like(x, dtype=ctx.dtype) for x in given]
        if given:
            torch._foreach_copy_(wide, given)
        results = iter(wide)
        return None, *(None if x is None else next(results) for x in grads)
