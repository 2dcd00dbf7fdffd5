"""The grouped engine: S equal students as one network of S times the channels.

A convolution has S times its groups, a norm S times its channels, a linear layer is one batched
product. Each stacked layer reads the students' own parameters and buffers, so state stays per
student. Channels are ordered student by student.

A tensor that all students read (the images, a trunk's output) stays one tensor as long as it can:
a convolution of it is **one dense convolution** with S times the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.cohort.alike import are_alike, template_of
from fastokd.cohort.convs import StudentConv, StudentPool
from fastokd.cohort.dropout import DropoutMasks
from fastokd.errors import UserError
from fastokd.models import Student, StudentOutput
from fastokd.models.external import ExternalStudent
from fastokd.models.layers import (
    ConcatChannels,
    Dropout,
    GlobalAveragePool,
    NormAct,
    is_altered,
    is_exactly,
)
from fastokd.ops.fused_bn_act import fused_bn_act

# These treat every channel alike, so they serve a stack of students as they are.
PASS_THROUGH = (
    nn.ReLU,
    nn.MaxPool2d,
    StudentPool,
    nn.AvgPool2d,
    nn.Identity,
    GlobalAveragePool,
    Dropout,
)
# What of a module may be code that joins or splits channels, which a stack has S times.
CODE = ("forward", "outputs", "stage", "_run")


class GroupedStudents:
    """Runs the stages from ``start`` on of equal students at once.

    Raises:
        UserError: the students differ, or hold a layer that can't be stacked, or code that isn't
            this package's; it is named.
    """

    def __init__(
        self, students: Sequence[Student], start: int, x_BCHW: Tensor, impl: str = "auto"
    ) -> None:
        """``x_BCHW``: an example of the shared input on the meta device."""
        if not are_alike(students):
            raise UserError("engine='grouped' stacks equal students, not a mixed cohort: use loop")
        if isinstance(students[0], ExternalStudent):
            raise UserError(
                f"engine='grouped' can't stack {students[0].name}, which is another library's: use "
                "loop or vmap"
            )
        self.students = tuple(students)
        self.start = start
        self.template = template_of(students[0], "grouped", torch.float32)
        self.dropout = DropoutMasks(students)
        widths = _concat_widths(self.template, start, x_BCHW)
        made: dict[nn.Module, nn.Module] = {}  # a layer used twice has two names
        for name, module in list(self.template.named_modules(remove_duplicate=False)):
            peers = [student.get_submodule(name) for student in students]
            if module not in made:
                made[module] = _stack(name, module, peers, widths.get(name), impl)
            stacked = made[module]
            if stacked is not module:
                parent, _, child = name.rpartition(".")
                setattr(self.template.get_submodule(parent), child, stacked)

    def __call__(self, x_BCHW: Tensor) -> list[StudentOutput]:
        """The outputs of each student over the shared ``x_BCHW``."""
        S = len(self.students)
        self.template.train(self.students[0].training)
        masks = self.dropout.draw(x_BCHW, self.template.training)
        for name, mask_SBD in masks.items():
            site = self.template.get_submodule(name)
            assert isinstance(site, Dropout)
            site.mask_BD = mask_SBD.transpose(0, 1).flatten(1)
        out = self.template.outputs(x_BCHW, self.start)
        logits_SBC = out.logits_BC.unflatten(1, (S, -1)).unbind(1)
        features_SBD = out.features_BD.unflatten(1, (S, -1)).unbind(1)
        maps = [map_BCHW.chunk(S, dim=1) for map_BCHW in out.maps]
        return [
            StudentOutput(logits_SBC[s], features_SBD[s], tuple(m[s] for m in maps))
            for s in range(S)
        ]


def _stack(
    name: str,
    module: nn.Module,
    peers: Sequence[nn.Module],
    widths: tuple[int, ...] | None,
    impl: str,
) -> nn.Module:
    """What stands for ``peers`` in the template; ``module`` itself where nothing must change."""
    if is_exactly(module, nn.Conv2d, StudentConv):
        assert isinstance(module, nn.Conv2d)
        if module.padding_mode != "zeros":
            raise UserError(
                f"engine='grouped' can't stack {name}, which pads by {module.padding_mode}: use loop"
            )
        return _Conv(peers)
    if is_exactly(module, NormAct) and module.running_mean is not None:
        return _NormAct(peers, impl)
    if is_exactly(module, nn.Linear):
        return _Linear(peers)
    if is_exactly(module, ConcatChannels):
        assert widths is not None
        return _Concat(len(peers), widths)
    own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    leaf = not list(module.children())
    if own or not (is_exactly(module, *PASS_THROUGH) if leaf else _is_ours(module)):
        what = f"{name} ({type(module).__name__})" if name else f"a {type(module).__name__}"
        raise UserError(f"engine='grouped' can't stack {what}: use loop or vmap")
    return module


def _is_ours(module: nn.Module) -> bool:
    """Whether the code around the layers is this package's, or that of a plain sequence."""
    code = [getattr(type(module), name, None) for name in CODE]
    homes = ("fastokd.models.", "torch.nn.modules.container", "torch.nn.modules.module")
    ours = all(part is None or part.__module__.startswith(homes) for part in code)
    return ours and not is_altered(module)


def _concat_widths(template: Student, start: int, x_BCHW: Tensor) -> dict[str, tuple[int, ...]]:
    """The channels of one student that each concatenation joins, seen in a run on meta tensors."""
    widths: dict[str, tuple[int, ...]] = {}
    hooks = []

    def watch(name: str) -> Callable[..., None]:
        def seen(_module: nn.Module, args: tuple[Tensor, ...], _out: Tensor) -> None:
            widths[name] = tuple(x.shape[1] for x in args)

        return seen

    for name, module in template.named_modules():
        if isinstance(module, NormAct):
            module.fused = None  # it runs on the CPU, not on meta tensors
        if isinstance(module, ConcatChannels):
            hooks.append(module.register_forward_hook(watch(name)))
    with torch.no_grad():
        template.eval().outputs(x_BCHW, start)
    for hook in hooks:
        hook.remove()
    return widths


def _spread(x_BCHW: Tensor, channels: int, students: int) -> Tensor:
    """A stack of students, made of a shared tensor where ``x_BCHW`` still is one."""
    if x_BCHW.shape[1] == channels * students:
        return x_BCHW
    assert x_BCHW.shape[1] == channels
    return x_BCHW.repeat(1, students, 1, 1)


class _Conv(nn.Module):
    """S convolutions as one; dense where their input is shared."""

    def __init__(self, convs: Sequence[nn.Module]) -> None:
        super().__init__()
        # In a tuple, so that the students' parameters aren't registered a second time.
        self.convs = tuple(conv for conv in convs if isinstance(conv, nn.Conv2d))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        first, S = self.convs[0], len(self.convs)
        weight = torch.cat([conv.weight for conv in self.convs])
        biases = [conv.bias for conv in self.convs if conv.bias is not None]
        dense = x_BCHW.shape[1] == first.in_channels and first.groups == 1
        if not dense:
            x_BCHW = _spread(x_BCHW, first.in_channels, S)
        return F.conv2d(
            x_BCHW,
            weight,
            torch.cat(biases) if biases else None,
            first.stride,
            first.padding,
            first.dilation,
            1 if dense else S * first.groups,
        )


class _NormAct(nn.Module):
    """S norms over S times the channels; each student's running statistics are its own."""

    def __init__(self, norms: Sequence[nn.Module], impl: str) -> None:
        super().__init__()
        self.norms = tuple(norm for norm in norms if isinstance(norm, NormAct))
        self.impl = impl

    def forward(self, x_BCHW: Tensor, residual_BCHW: Tensor | None = None) -> Tensor:
        first, S = self.norms[0], len(self.norms)
        x_BCHW = _spread(x_BCHW, first.num_features, S)
        if residual_BCHW is not None:
            residual_BCHW = _spread(residual_BCHW, first.num_features, S)
        means = [_buffer(norm.running_mean) for norm in self.norms]
        variances = [_buffer(norm.running_var) for norm in self.norms]
        mean, variance = torch.cat(means), torch.cat(variances)
        y_BCHW = fused_bn_act(
            x_BCHW,
            torch.cat([norm.weight for norm in self.norms]),
            torch.cat([norm.bias for norm in self.norms]),
            mean,
            variance,
            _buffer(first.num_batches_tracked),
            residual_BCHW=residual_BCHW,
            relu=first.relu,
            momentum=first.momentum,
            eps=first.eps,
            training=first.training,
            impl=self.impl,
        )
        if first.training:
            with torch.no_grad():
                torch._foreach_copy_(means, list(mean.chunk(S)))
                torch._foreach_copy_(variances, list(variance.chunk(S)))
                for norm in self.norms[1:]:
                    _buffer(norm.num_batches_tracked).add_(1)
        return y_BCHW


def _buffer(buffer: Tensor | None) -> Tensor:
    assert buffer is not None
    return buffer


class _Linear(nn.Module):
    """S linear layers as one batched product."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        super().__init__()
        self.linears = tuple(linear for linear in linears if isinstance(linear, nn.Linear))

    def forward(self, x_BD: Tensor) -> Tensor:
        S = len(self.linears)
        weight_SOD = torch.stack([linear.weight for linear in self.linears])
        x_SBD = x_BD.unflatten(1, (S, -1)).transpose(0, 1)
        biases: list[Tensor] = [linear.bias for linear in self.linears if linear.bias is not None]
        if biases:
            y_SBO = torch.baddbmm(torch.stack(biases)[:, None], x_SBD, weight_SOD.mT)
        else:
            y_SBO = torch.bmm(x_SBD, weight_SOD.mT)
        return y_SBO.transpose(0, 1).flatten(1)


class _Concat(nn.Module):
    """Joins stacks so that each student's channels stay together."""

    def __init__(self, students: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.students = students
        self.widths = widths

    def forward(self, *maps_BCHW: Tensor) -> Tensor:
        # Channels last, where a split of the channels is a view and the result is dense.
        parts_BHWSC = [
            _spread(x_BCHW, width, self.students)
            .permute(0, 2, 3, 1)
            .unflatten(3, (self.students, width))
            for x_BCHW, width in zip(maps_BCHW, self.widths, strict=True)
        ]
        return torch.cat(parts_BHWSC, dim=4).flatten(3).permute(0, 3, 1, 2)
