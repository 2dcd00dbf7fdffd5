"""Replaces layers of a student; no other module does.

A layer is replaced only if its type is exactly the given one and it isn't altered
(:func:`is_exactly`); subclasses are called unchanged. A replacement (:func:`replace`) keeps the state,
its keys, ties and taps. Values are passed through layers twice only: the masks of
:class:`~fastokd.models.layers.Dropout` (``cohort/dropout.py``), and within a forward the casts of weights
(``cohort/shadows.py``).
"""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

from torch import Tensor, nn

from fastokd.models import Student
from fastokd.models.layers import NormAct, Tap
from fastokd.ops import conv, max_pool

M = TypeVar("M", bound=nn.Module)
# Methods of a container whose code may join or split channels, or read a layer's weight.
CODE = ("forward", "outputs", "stage", "_run")


def is_exactly(module: nn.Module, *kinds: type[M]) -> TypeGuard[M]:
    """Whether the type of ``module`` is one of ``kinds``, not a subclass, and it isn't altered."""
    return type(module) in kinds and not is_altered(module)


def is_altered(module: nn.Module) -> bool:
    """Whether this instance has a ``forward`` of its own, or a hook that isn't a :class:`Tap`."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    own = any(not isinstance(hook, Tap) for kind in hooks for hook in kind.values())
    return own or "forward" in vars(module)


def is_ours(module: nn.Module) -> bool:
    """Whether the code of this container is this package's, or torch's own containers'."""
    code = [getattr(type(module), name, None) for name in CODE]
    homes = ("fastokd.models.", "torch.nn.modules.container", "torch.nn.modules.module")
    ours = all(part is None or part.__module__.startswith(homes) for part in code)
    return ours and not is_altered(module)


def replace(module: nn.Module, kind: type[nn.Module], **settings: Any) -> None:
    """Turns ``module`` in place into a ``kind``, a layer with the same state, with these settings."""
    module.__class__ = kind
    for name, value in settings.items():
        setattr(module, name, value)


class OpConv2d(nn.Conv2d):
    """A convolution that :func:`fastokd.ops.conv.suits`, computed by ``ops/conv.py``."""

    impl = "auto"

    def forward(self, x_BCHW: Tensor) -> Tensor:
        stride, padding = self.stride[0], int(self.padding[0])
        return conv.conv2d(x_BCHW, self.weight, self.bias, stride, padding, impl=self.impl)


class OpMaxPool2d(nn.MaxPool2d):
    """A pooling that :func:`fastokd.ops.max_pool.suits`, computed by ``ops/max_pool.py``."""

    impl = "auto"

    def forward(self, x_BCHW: Tensor) -> Tensor:
        stride = self.stride if isinstance(self.stride, int) else self.stride[0]
        return max_pool.max_pool(x_BCHW, stride, impl=self.impl)


def use_ops(student: Student, impl: str) -> None:
    """Makes ``ops/`` compute the norms, convolutions and poolings of ``student``.

    ``impl``: that of the norms, which raise if it isn't available. Convolutions and poolings take the
    device's own layer by layer, or PyTorch's, unless it is ``"torch"``.
    """
    of_others = "torch" if impl == "torch" else "auto"
    for module in student.modules():
        if isinstance(module, NormAct):
            module.impl = impl
        elif is_exactly(module, nn.Conv2d) and conv.suits(module):
            replace(module, OpConv2d)
        elif is_exactly(module, nn.MaxPool2d) and max_pool.suits(module):
            replace(module, OpMaxPool2d)
        if isinstance(module, (OpConv2d, OpMaxPool2d)):
            module.impl = of_others
