"""The grouped engine: S equal students as one network of S times the channels.

A convolution has S times its groups, a norm S times its channels, a linear layer is one batched
GEMM. Each stacked layer reads the students' own parameters and buffers, which lie in one memory
(``stacks.py``), so state stays per student. Channels are ordered student by student.

A tensor that all students read (the images, a trunk's output) isn't repeated before a layer needs it
so: a convolution of it is one dense convolution with S times the outputs. Where each student has a view
of its own, their channels are joined first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.cohort.alike import template_of
from fastokd.cohort.dropout import DropoutMasks, give
from fastokd.cohort.layers import OpConv2d, OpMaxPool2d, is_exactly, is_ours
from fastokd.cohort.shadows import shadowed, sites_of
from fastokd.cohort.stacks import Stack
from fastokd.errors import UserError
from fastokd.models import Student, StudentOutput
from fastokd.models.external import ExternalStudent
from fastokd.models.layers import ConcatChannels, Dropout, GlobalAveragePool, NormAct
from fastokd.ops.fused_bn_act import fused_bn_act

# Layers that treat channels independently, and so take a stack of students unchanged.
PASS_THROUGH = (
    nn.ReLU,
    nn.MaxPool2d,
    OpMaxPool2d,
    nn.AvgPool2d,
    nn.Identity,
    GlobalAveragePool,
    Dropout,
)


class GroupedStudents:
    """Runs the stages from ``start`` on of equal students at once.

    Raises:
        UserError: the students differ, or have a layer that can't be stacked or code that isn't this
            package's; the message names it.
    """

    def __init__(self, students: Sequence[Student], start: int) -> None:
        self.students = tuple(students)
        self.start = start
        self.template = template_of(students, "grouped", torch.float32)
        if isinstance(self.template, ExternalStudent):
            raise UserError(
                f"engine='grouped' can't stack {self.template.name}, which is another library's: use "
                "loop or vmap"
            )
        self.dropout = DropoutMasks(students)
        self.sites = sites_of(*students)
        made: dict[nn.Module, nn.Module] = {}  # a layer used twice has two names
        for name, module in list(self.template.named_modules(remove_duplicate=False)):
            if module not in made:
                layers = [student.get_submodule(name) for student in students]
                made[module] = _stack(name, module, layers)
            stacked = made[module]
            if stacked is not module:
                parent, _, child = name.rpartition(".")
                setattr(self.template.get_submodule(parent), child, stacked)
        ours = [layer for layer in made.values() if isinstance(layer, _Stacked)]
        cast = [layer for layer in ours if isinstance(layer, (_Conv, _Linear))]
        self.stacks = [stack for layer in ours for stack in layer.stacks.values()]
        self.cast = [stack for layer in cast for stack in layer.stacks.values()]
        # How often a forward runs each norm. Their batches are counted together, unless a norm reads
        # the count.
        modules = (m for _, m in self.template.named_modules(remove_duplicate=False))
        self.norms = Counter(m for m in modules if isinstance(m, _NormAct) and not m.is_cumulative)

    def __call__(self, read: Sequence[Tensor]) -> list[StudentOutput]:
        """The outputs of each student over what it reads, or over the one that all read."""
        S = len(self.students)
        x_BCHW = read[0] if len(read) == 1 else torch.cat(list(read), dim=1)
        self.template.train(self.students[0].training)
        masks = self.dropout.draw(x_BCHW, self.template.training)
        give(
            self.template, {k: mask_SBD.transpose(0, 1).flatten(1) for k, mask_SBD in masks.items()}
        )
        with shadowed(self.sites, self.cast):
            out = self.template.outputs(x_BCHW, self.start)
        counts = [
            (count, runs)
            for norm, runs in self.norms.items()
            if norm.first[0].training
            for count in norm.stacks["num_batches_tracked"].in_place()
        ]
        if counts:
            torch._foreach_add_([count for count, _ in counts], [runs for _, runs in counts])
        logits_SBC = out.logits_BC.unflatten(1, (S, -1)).unbind(1)
        features_SBD = out.features_BD.unflatten(1, (S, -1)).unbind(1)
        maps = [map_BCHW.chunk(S, dim=1) for map_BCHW in out.maps]
        return [
            StudentOutput(logits_SBC[s], features_SBD[s], tuple(m[s] for m in maps))
            for s in range(S)
        ]


def _stack(name: str, module: nn.Module, layers: Sequence[Any]) -> nn.Module:
    """The layer that replaces the students' ``layers`` in the template; ``module`` if it can stay."""
    if is_exactly(module, nn.Conv2d, OpConv2d):
        if module.padding_mode != "zeros":
            raise UserError(
                f"engine='grouped' can't stack {name}, which pads by {module.padding_mode}: use loop"
            )
        return _Conv(layers)
    if is_exactly(module, NormAct) and module.running_mean is not None:
        return _NormAct(layers)
    if is_exactly(module, nn.Linear):
        return _Linear(layers)
    if is_exactly(module, ConcatChannels) and module.widths:
        return _Concat(layers)
    own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    leaf = not list(module.children())
    if own or not (is_exactly(module, *PASS_THROUGH) if leaf else is_ours(module)):
        what = f"{name} ({type(module).__name__})" if name else f"a {type(module).__name__}"
        raise UserError(f"engine='grouped' can't stack {what}: use loop or vmap")
    return module


def _spread(x_BCHW: Tensor, channels: int, students: int) -> Tensor:
    """``x_BCHW`` as a stack of students; a tensor that they share is repeated."""
    if x_BCHW.shape[1] == channels * students:
        return x_BCHW
    assert x_BCHW.shape[1] == channels
    return x_BCHW.repeat(1, students, 1, 1)


class _Stacked(nn.Module):
    """S layers as one.

    Attributes:
        first: the first of them, whose settings are those of all; in a tuple, so that its parameters
            aren't registered a second time.
        stacks: their parameters and buffers by name.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.first, self.students = (layers[0],), len(layers)
        named = (*layers[0]._parameters.items(), *layers[0]._buffers.items())
        self.stacks = {name: Stack(layers, name) for name, x in named if x is not None}
        # While activations are recomputed statistics stay as they are.
        self.recomputing = False

    def as_now(self) -> Callable[[], AbstractContextManager[None]]:
        """A context, entered later, in which the layers compute with the casts of now."""
        shadows = {name: stack.shadow for name, stack in self.stacks.items()}

        @contextmanager
        def context() -> Iterator[None]:
            for name, stack in self.stacks.items():
                stack.shadow = shadows[name]
            self.recomputing = True
            try:
                yield
            finally:
                self.recomputing = False
                for stack in self.stacks.values():
                    stack.shadow = None

        return context


class _Conv(_Stacked):
    """S convolutions as one; dense where their input is shared."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        (first,), S = self.first, self.students
        bias = self.stacks.get("bias")
        dense = x_BCHW.shape[1] == first.in_channels and first.groups == 1
        if not dense:
            x_BCHW = _spread(x_BCHW, first.in_channels, S)
        return F.conv2d(
            x_BCHW,
            self.stacks["weight"]().flatten(0, 1),
            None if bias is None else bias().flatten(),
            first.stride,
            first.padding,
            first.dilation,
            1 if dense else S * first.groups,
        )


class _NormAct(_Stacked):
    """S norms over S times the channels; each student's running statistics are its own."""

    @property
    def is_cumulative(self) -> bool:
        """Whether the running statistics are averages over all batches, and so read their count."""
        return self.first[0].momentum is None

    def forward(self, x_BCHW: Tensor, residual_BCHW: Tensor | None = None) -> Tensor:
        (first,), S = self.first, self.students
        x_BCHW = _spread(x_BCHW, first.num_features, S)
        if residual_BCHW is not None:
            residual_BCHW = _spread(residual_BCHW, first.num_features, S)
        statistics = [self.stacks["running_mean"], self.stacks["running_var"]]
        mean_SC, variance_SC = (stack() for stack in statistics)
        if self.recomputing:
            mean_SC, variance_SC = mean_SC.clone(), variance_SC.clone()
        counts_S = None
        if self.is_cumulative:
            counts_S = self.stacks["num_batches_tracked"]()
        y_BCHW = fused_bn_act(
            x_BCHW,
            self.stacks["weight"]().flatten(),
            self.stacks["bias"]().flatten(),
            mean_SC.flatten(),
            variance_SC.flatten(),
            None if counts_S is None else counts_S[0],
            residual_BCHW=residual_BCHW,
            relu=first.relu,
            momentum=first.momentum,
            eps=first.eps,
            training=first.training,
            impl=first.impl,
        )
        if first.training and not self.recomputing:
            for stack, now_SC in zip(statistics, (mean_SC, variance_SC), strict=True):
                stack.write(now_SC)
            if counts_S is not None:
                counts_S[1:] += 1
                self.stacks["num_batches_tracked"].write(counts_S)
        return y_BCHW


class _Linear(_Stacked):
    """S linear layers as one batched product."""

    def forward(self, x_BD: Tensor) -> Tensor:
        weight_SOD, bias = self.stacks["weight"](), self.stacks.get("bias")
        x_SBD = x_BD.unflatten(1, (self.students, -1)).transpose(0, 1)
        if bias is not None:
            y_SBO = torch.baddbmm(bias()[:, None], x_SBD, weight_SOD.mT)
        else:
            y_SBO = torch.bmm(x_SBD, weight_SOD.mT)
        return y_SBO.transpose(0, 1).flatten(1)


class _Concat(nn.Module):
    """Joins stacks so that each student's channels stay together."""

    def __init__(self, concats: Sequence[ConcatChannels]) -> None:
        super().__init__()
        self.students = len(concats)
        self.widths = concats[0].widths

    def forward(self, *maps_BCHW: Tensor) -> Tensor:
        # Channels last, where a split of the channels is a view and the result is dense.
        stacks_BHWSC = [
            _spread(x_BCHW, width, self.students)
            .permute(0, 2, 3, 1)
            .unflatten(3, (self.students, width))
            for x_BCHW, width in zip(maps_BCHW, self.widths, strict=True)
        ]
        return torch.cat(stacks_BHWSC, dim=4).flatten(3).permute(0, 3, 1, 2)
