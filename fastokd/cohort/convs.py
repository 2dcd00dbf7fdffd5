"""The convolutions and pools of a cohort's students, as the engines want them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.models import Student
from fastokd.models.layers import is_exactly
from fastokd.ops import max_pool
from fastokd.ops.conv import conv2d, suits


class StudentConv(nn.Conv2d):
    """An ``nn.Conv2d`` with its state under its keys, whose output may be given, once.

    ``suited``: a layer that the kernels of ``ops/conv.py`` take.
    """

    given_BCHW: Tensor | None
    suited = False
    impl = "auto"

    def forward(self, x_BCHW: Tensor) -> Tensor:
        given_BCHW, self.given_BCHW = self.given_BCHW, None
        if given_BCHW is not None:
            return given_BCHW
        if not self.suited:
            return super().forward(x_BCHW)
        return self.convolve(x_BCHW, self.weight, self.bias)

    def convolve(self, x_BCHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """This convolution with another weight, of any number of outputs."""
        if self.suited:
            stride, padding = self.stride[0], int(self.padding[0])
            return conv2d(x_BCHW, weight, bias, stride, padding, impl=self.impl)
        return F.conv2d(x_BCHW, weight, bias, self.stride, self.padding, self.dilation)


def student_conv(student: Student, name: str) -> StudentConv:
    """The convolution ``name`` of ``student``, which is made a :class:`StudentConv` in its place."""
    conv = student.get_submodule(name)
    if isinstance(conv, StudentConv):
        return conv
    assert is_exactly(conv, nn.Conv2d)
    conv.__class__ = StudentConv
    assert isinstance(conv, StudentConv)
    conv.suited = suits(conv)
    conv.given_BCHW = None  # an instance attribute from the start: Dynamo guards on where it lives
    return conv


class StudentPool(nn.MaxPool2d):
    """An ``nn.MaxPool2d`` that runs as ``ops/max_pool.py`` has it while it is ``suited``."""

    suited = True
    impl = "auto"

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.suited:
            y_BCHW: Tensor = super().forward(x_BCHW)
            return y_BCHW
        stride = self.stride if isinstance(self.stride, int) else self.stride[0]
        return max_pool.max_pool(x_BCHW, stride, impl=self.impl)


def suited_layers(student: Student, impl: str) -> None:
    """Lets the convolutions and pools of ``student`` run as ``ops/`` has them."""
    for name, module in list(student.named_modules()):
        if is_exactly(module, nn.Conv2d) and suits(module):
            student_conv(student, name).impl = impl
        if is_exactly(module, nn.MaxPool2d) and max_pool.suits(module):
            module.__class__ = StudentPool
            assert isinstance(module, StudentPool)
            module.impl = "torch" if impl == "torch" else "auto"
