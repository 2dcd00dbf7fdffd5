"""The vmap engine: one student's forward over stacked parameters and buffers (``stacks.py``).

It runs any students of equal architecture. With a shared input, vmap's batching rule turns a
convolution over stacked weights into one dense convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from fastokd.cohort.alike import template_of
from fastokd.cohort.dropout import DropoutMasks, give
from fastokd.cohort.layers import OpConv2d, is_altered, is_exactly, replace, use_ops
from fastokd.cohort.shadows import shadowed, sites_of
from fastokd.cohort.stacks import Stack
from fastokd.errors import UserError, in_one_line
from fastokd.models import Student, StudentOutput
from fastokd.models.layers import Dropout, NormAct

State = dict[str, Tensor]
NARROW = (torch.bfloat16, torch.float16)
# Layers whose weights autocast would cast.
CAST = (nn.Conv2d, OpConv2d, nn.Linear)


class _Outputs(nn.Module):
    """A student from a stage on, as a module whose ``forward`` returns all outputs."""

    def __init__(self, student: Student, start: int) -> None:
        super().__init__()
        self.student = student
        self.start = start

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        out = self.student.outputs(x_BCHW, self.start)
        return out.logits_BC, out.features_BD, out.maps


class VmapStudents:
    """Runs the stages from ``start`` on of equal students under ``torch.func.vmap``.

    Raises:
        UserError: the students differ, or have what can't run under ``vmap``: another dropout layer, a
            norm without momentum, code that reads values; the message names it.
    """

    def __init__(self, students: Sequence[Student], start: int, x_BCHW: Tensor) -> None:
        """``x_BCHW``: an example of the shared input on the meta device."""
        self.students = tuple(students)
        self.dropout = DropoutMasks(students)
        self.sites = sites_of(*students)
        self.template = _Outputs(template_of(students, "vmap"), start)
        use_ops(self.template.student, "torch")  # the ops have no batching rules
        for name, module in self.template.student.named_modules():
            if is_altered(module):  # the hook or forward may refer to the first student
                raise UserError(
                    f"engine='vmap' can't take the hook or forward that was set on {name}: use loop"
                )
            if isinstance(module, nn.BatchNorm2d) and module.momentum is None:
                raise UserError(
                    f"engine='vmap' can't count the batches of {name} (momentum None): use loop"
                )
            own = type(module) is Dropout  # its masks are drawn outside vmap
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and not own:
                raise UserError(
                    f"engine='vmap' can't draw the masks of {name} ({type(module).__name__}): use loop"
                )
            if is_exactly(module, NormAct, nn.BatchNorm2d):
                replace(
                    module, _Norm, engine=self, relu=isinstance(module, NormAct) and module.relu
                )
        # Whether norms run in float32. vmap applies weight and bias outside the norm, and without them
        # only a GPU's channels-last kernels take statistics of another dtype than the map's.
        self.float_norms = True
        # Autocast has no effect inside vmap on a CPU: what it would cast is cast before.
        self.cast = {
            f"{path}.{name}" if path else name
            for path, module in self.template.student.named_modules()
            if type(module) in CAST
            for name, _ in module.named_parameters(recurse=False)
        }
        self.uncast = [
            f"{path} ({type(module).__name__})"
            for path, module in self.template.student.named_modules()
            if type(module) not in (*CAST, _Norm) and [*module.parameters(recurse=False)]
        ]
        first = students[0]
        self.parameters = {key: self._stack(key) for key, _ in first.named_parameters()}
        self.buffers = {key: self._stack(key) for key, _ in first.named_buffers()}
        self.stacks = [*self.parameters.values(), *self.buffers.values()]
        self._try(x_BCHW)

    def _stack(self, key: str) -> Stack:
        path, _, name = key.rpartition(".")
        known = type(self.template.student.get_submodule(path)) in (*CAST, _Norm)
        layers = [student.get_submodule(path) for student in self.students]
        return Stack(layers, name, owns_gradient=known)

    def __call__(self, read: Sequence[Tensor]) -> list[StudentOutput]:
        """The outputs of each student over what it reads, or over the one that all read."""
        cast = [stack for key, stack in self.parameters.items() if key in self.cast]
        with shadowed(self.sites, cast):
            parameters = {key: stack() for key, stack in self.parameters.items()}
        kind = read[0].device.type
        last = read[0].is_contiguous(memory_format=torch.channels_last)
        self.float_norms = kind == "cpu" or not last
        if torch.is_autocast_enabled(kind):
            self._cast(parameters, kind)
        buffers = {key: stack() for key, stack in self.buffers.items()}
        training = self.students[0].training
        (logits_SBC, features_SBD, maps), buffers = self._run(parameters, buffers, read, training)
        if training:
            for key, stack in self.buffers.items():
                stack.write(buffers[key])
        return [
            StudentOutput(logits_SBC[s], features_SBD[s], tuple(m[s] for m in maps))
            for s in range(len(self.students))
        ]

    def _run(
        self, parameters: State, buffers: State, read: Sequence[Tensor], training: bool
    ) -> tuple[Any, State]:
        """The result of :class:`_Outputs` and the buffers after it; S is the first dimension of all."""
        self.template.train(training)

        def run(state: State, buffers: State, masks: State, x_BCHW: Tensor) -> tuple[Any, State]:
            give(self.template.student, masks)
            named = {f"student.{key}": value for key, value in (state | buffers).items()}
            out = functional_call(self.template, named, (x_BCHW,))
            # functional_call puts a buffer that was assigned, not written in place, into `named`.
            return out, {key: named[f"student.{key}"] for key in buffers}

        masks = self.dropout.draw(read[0], training)
        each = len(read) > 1
        # `cat` keeps channels-last, `stack` doesn't.
        x = torch.cat(list(read)).unflatten(0, (len(read), -1)) if each else read[0]
        in_dims = (0, 0, 0, 0 if each else None)
        out, buffers = vmap(run, in_dims=in_dims)(parameters, buffers, masks, x)
        return out, buffers

    def _cast(self, parameters: State, kind: str) -> None:
        if kind == "cpu" and self.uncast:
            raise UserError(
                f"engine='vmap' can't cast {self.uncast[0]} as autocast does: use loop, or "
                "--precision fp32"
            )
        dtype = torch.get_autocast_dtype(kind)
        parameters.update({key: parameters[key].to(dtype) for key in self.cast})

    def _try(self, x_BCHW: Tensor) -> None:
        """Runs both modes on the meta device, so that errors are raised here and not in a step."""
        student, S = self.students[0], len(self.students)
        parameters, buffers = (
            {k: torch.empty(S, *v.shape, dtype=v.dtype, device="meta") for k, v in named}
            for named in (student.named_parameters(), student.named_buffers())
        )
        x_BCHW = x_BCHW.to(next(iter(parameters.values())).dtype)
        if next(student.parameters()).device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            self._cast(parameters, "cpu")
            x_BCHW = x_BCHW.to(torch.get_autocast_dtype("cpu"))
        try:
            with torch.device("meta"), torch.no_grad():
                for training in (False, True):
                    self._run(parameters, buffers, [x_BCHW], training)
        except Exception as error:  # the students' own code ran
            raise UserError(
                f"engine='vmap' can't run these students ({in_one_line(error)}): use loop"
            ) from error


class _Norm(NormAct):
    """A norm without cuDNN: to choose cuDNN, torch queries the memory format, which vmap lacks."""

    engine: VmapStudents

    def forward(self, x_BCHW: Tensor, residual_BCHW: Tensor | None = None) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        assert self.momentum is not None
        y_BCHW = torch.batch_norm(
            x_BCHW.float() if self.engine.float_norms and x_BCHW.dtype in NARROW else x_BCHW,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.training or self.running_mean is None,
            self.momentum,
            self.eps,
            False,
        ).to(x_BCHW.dtype)
        if residual_BCHW is not None:
            y_BCHW = y_BCHW + residual_BCHW
        return F.relu(y_BCHW) if self.relu else y_BCHW
