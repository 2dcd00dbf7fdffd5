"""The students' layers beside torch's own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.ops.fused_bn_act import norm_act


class Tap:
    """A forward hook that stores a module's input or output until the student reads it.

    An object, not a closure, so that a deep copy of the student has taps of its own.
    """

    def __init__(self, taken: dict[str, Tensor], key: str, of_input: bool = False) -> None:
        self.taken = taken
        self.key = key
        self.of_input = of_input

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.taken[self.key] = args[0] if self.of_input else output


class NormAct(nn.BatchNorm2d):
    """BatchNorm, then an optional residual, then an optional ReLU, as one module.

    It holds exactly the state of ``nn.BatchNorm2d``, so checkpoints keep their plain keys.

    ``impl``: ``"torch"`` is torch's three operations; another is that of
    :func:`fastokd.ops.fused_bn_act`.
    """

    impl = "torch"

    def __init__(self, channels: int, *, relu: bool = True, momentum: float = 0.1) -> None:
        super().__init__(channels, momentum=momentum)
        self.relu = relu

    def forward(self, x_BCHW: Tensor, residual_BCHW: Tensor | None = None) -> Tensor:
        if self.impl != "torch":
            return norm_act(self, x_BCHW, residual_BCHW, impl=self.impl)
        y_BCHW = super().forward(x_BCHW)
        if residual_BCHW is not None:
            y_BCHW = y_BCHW + residual_BCHW
        return F.relu(y_BCHW) if self.relu else y_BCHW


class ConcatChannels(nn.Module):
    """Concatenation of maps of these ``widths`` along channels: a module, so that an engine which
    stacks students along channels can interleave them right."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.widths = widths

    def forward(self, *maps_BCHW: Tensor) -> Tensor:
        return torch.cat(maps_BCHW, dim=1)


class GlobalAveragePool(nn.Module):
    """``[B, C, H, W] -> [B, C]``."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.mean((2, 3))


class Dropout(nn.Dropout):
    """Dropout of ``[B, width]`` features whose mask may be given.

    The next training forward multiplies by ``mask_BD`` (0, or 1 / (1 - p)) where an engine has set it:
    the masks of all students are drawn at once, so that all engines drop the same features.
    """

    mask_BD: Tensor | None

    def __init__(self, p: float, width: int) -> None:
        super().__init__(p)
        self.width = width
        self.mask_BD = None

    def forward(self, x_BD: Tensor) -> Tensor:
        mask_BD, self.mask_BD = self.mask_BD, None
        if self.training and mask_BD is not None:
            return x_BD * mask_BD
        return super().forward(x_BD)


class DropPath(nn.Module):
    """Stochastic depth: a residual branch is left out for some images of a training batch.

    Huang et al., *Deep Networks with Stochastic Depth*, section 3; torchvision's ``StochasticDepth`` and
    timm's ``DropPath``, whose mask may be given as that of :class:`Dropout`: the next training
    forward keeps the branches that ``mask_B`` says where an engine has set it.

    Args:
        p: the probability that a branch is dropped.
        by_row: for each image by itself; else for the whole batch.
        scaled: a branch that stays is divided by 1 - p.
    """

    mask_B: Tensor | None

    def __init__(self, p: float, *, by_row: bool = True, scaled: bool = True) -> None:
        super().__init__()
        self.p, self.by_row, self.scaled = p, by_row, scaled
        self.mask_B = None

    def masks(self, u: Tensor) -> Tensor:
        """Whether a branch stays, from uniform numbers ``[..., B]`` in [0, 1)."""
        kept = u >= self.p
        return kept if self.by_row else kept[..., :1].expand(u.shape)

    def forward(self, x: Tensor) -> Tensor:
        mask_B, self.mask_B = self.mask_B, None
        if not self.training:
            return x
        if mask_B is None:
            mask_B = self.masks(torch.rand(x.shape[0], device=x.device))
        weight_B = mask_B.to(x.dtype)
        if self.scaled and self.p < 1:
            weight_B = weight_B / (1 - self.p)
        return x * weight_B.view(-1, *[1] * (x.dim() - 1))


def conv3x3(inputs: int, outputs: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


def numbered(layers: Mapping[int, nn.Module]) -> nn.Sequential:
    """A sequential whose children carry the given numbers.

    Published networks have ReLUs as children; here they are part of :class:`NormAct`, so the numbers
    have gaps.
    """
    return nn.Sequential(OrderedDict((str(place), layer) for place, layer in layers.items()))


def init_kaiming_fan_out(model: nn.Module, *, zero_bias: bool = False) -> None:
    """Convolutions Kaiming normal over their fan-out: normal(0, sqrt(2 / (k * k * outputs))).

    Their biases keep torch's initialisation or are zeroed; norms and linear layers keep torch's.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_bias and module.bias is not None:
                nn.init.zeros_(module.bias)
