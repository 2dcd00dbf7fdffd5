"""Convolutions of a tensor that all students read: one dense convolution for all of them.

The stem of a network cohort, and in every branch the convolutions that read the trunk's output,
have one input and S weights. Side by side the weights make one convolution with S times the
outputs, that reads its input once and fills wide registers; its gradient with respect to the input
is the sum over students.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from fastokd.cohort.alike import template_of
from fastokd.cohort.convs import StudentConv, student_conv
from fastokd.models import Student
from fastokd.models.layers import NormAct, is_exactly


class SharedConvs:
    """The convolutions of equal students that read the tensor at stage ``start``.

    ``x_BCHW`` is an example of that tensor on the meta device.
    """

    def __init__(self, students: Sequence[Student], start: int, x_BCHW: Tensor) -> None:
        self.sites = [
            [student_conv(student, name) for student in students]
            for name in readers(students[0], start, x_BCHW)
        ]

    def give(self, x_BCHW: Tensor) -> None:
        """Computes the outputs of every student's first convolutions, and hands them over."""
        for convs in self.sites:
            first = convs[0]
            weights = [conv.weight for conv in convs]
            biases = [conv.bias for conv in convs if conv.bias is not None]
            if biases or first.suited or x_BCHW.requires_grad:
                bias = torch.cat(biases) if biases else None
                y_BCHW = first.convolve(x_BCHW, torch.cat(weights), bias)
                parts = _dense(y_BCHW, len(convs))
            else:
                geometry = (first.stride, first.padding, first.dilation)
                parts = _Stems.apply(x_BCHW, geometry, *weights)
            for conv, part_BCHW in zip(convs, parts, strict=True):
                conv.given_BCHW = part_BCHW

    def forget(self) -> None:
        """Nothing is handed over any more: a forward that failed has left some of it."""
        for convs in self.sites:
            for conv in convs:
                conv.given_BCHW = None


def readers(student: Student, start: int, x_BCHW: Tensor) -> list[str]:
    """The convolutions of ``student`` that read the input of stage ``start`` itself, and no other.

    None where the student can't be followed without memory.
    """
    try:
        template = template_of(student, "loop", torch.float32).eval()
        return _followed(template, start, x_BCHW)
    except Exception:  # hooks and attributes of the student's own may hold tensors with memory
        return []


def _followed(template: Student, start: int, x_BCHW: Tensor) -> list[str]:
    read: dict[str, list[bool]] = {}
    for name, module in template.named_modules():
        if isinstance(module, NormAct):
            module.fused = None  # it runs on the CPU, not on meta tensors
        if _can_share(module):

            def watch(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                read.setdefault(name, []).append(bool(args) and args[0] is x_BCHW)

            module.register_forward_pre_hook(watch)
    with torch.no_grad():
        template.outputs(x_BCHW, start)
    return [name for name, calls in read.items() if calls == [True]]


def _can_share(module: nn.Module) -> bool:
    if not is_exactly(module, nn.Conv2d, StudentConv):
        return False
    assert isinstance(module, nn.Conv2d)
    plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return plain and module.groups == 1


class _Stems(torch.autograd.Function):
    """Convolutions of images: side by side forward, apart backward.

    Nobody asks for the images' gradient, so that the gradients of the outputs, the widest maps of a
    network, need not be laid side by side again.
    """

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, geometry: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        device = x_BCHW.device.type
        if torch.is_autocast_enabled(device):
            x_BCHW = x_BCHW.to(torch.get_autocast_dtype(device))
        ctx.save_for_backward(x_BCHW)
        ctx.geometry, ctx.weights = geometry, [(w.shape, w.dtype) for w in weights]
        y_BCHW = F.conv2d(x_BCHW, torch.cat(weights).to(x_BCHW.dtype), None, *geometry)
        return _dense(y_BCHW, len(weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_BCHW,) = ctx.saved_tensors
        of_weights = [
            conv2d_weight(x_BCHW, shape, grad, *ctx.geometry).to(dtype)
            for (shape, dtype), grad in zip(ctx.weights, grads, strict=True)
        ]
        return None, None, *of_weights


def _dense(y_BCHW: Tensor, count: int) -> tuple[Tensor, ...]:
    """Its equal parts, each as dense as what follows wants it."""
    last = y_BCHW.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return tuple(part.contiguous(memory_format=layout) for part in y_BCHW.chunk(count, dim=1))
