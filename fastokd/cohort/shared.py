"""Convolutions of a tensor that all students read: one dense convolution for all of them.

The stem of a network cohort, and in every branch the convolutions that read the trunk's output,
have one input and S weights. Side by side the weights make one convolution with S times the
outputs, that reads its input once and fills wide registers; its gradient with respect to the input
is the sum over students.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastokd.cohort.convs import student_conv
from fastokd.models import Student
from fastokd.models.layers import NormAct


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
            biases = [conv.bias for conv in convs if conv.bias is not None]
            weight = torch.cat([conv.weight for conv in convs])
            bias = torch.cat(biases) if biases else None
            y_BCHW = first.convolve(x_BCHW, weight, bias)
            for conv, part_BCHW in zip(convs, y_BCHW.chunk(len(convs), dim=1), strict=True):
                # What follows wants dense maps.
                conv.given_BCHW = part_BCHW.contiguous(memory_format=_layout(x_BCHW))


def readers(student: Student, start: int, x_BCHW: Tensor) -> list[str]:
    """The convolutions of ``student`` that read the input of stage ``start`` itself."""
    template = copy.deepcopy(student).to("meta", torch.float32).eval()
    found: list[str] = []
    for name, module in template.named_modules():
        if isinstance(module, NormAct):
            module.fused = None  # it runs on the CPU, not on meta tensors
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":

            def watch(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                if args[0] is x_BCHW:
                    found.append(name)

            module.register_forward_pre_hook(watch)
    with torch.no_grad():
        template.outputs(x_BCHW, start)
    return found


def _layout(x_BCHW: Tensor) -> torch.memory_format:
    last = x_BCHW.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
