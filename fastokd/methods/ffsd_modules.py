"""FFSD's modules beside its students: decoders, the fusion module, the leader's transfusion.

Keys are the published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.cohort.layers import is_exactly
from fastokd.models.layers import NormAct
from fastokd.ops.conv import conv_transpose2d
from fastokd.ops.fused_bn_act import fused_bn_act
from fastokd.ops.fusion_step import fusion_step


class DecoderBlock(nn.Module):
    """Transposed 3x3 convolution to twice the height and width, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, impl: str = "auto") -> None:
        super().__init__()
        self.impl = impl
        # Spelt as published.
        self.convtranpose = nn.ConvTranspose2d(
            inputs, outputs, 3, stride=2, padding=1, output_padding=1, bias=False
        )
        self.norm = NormAct(outputs)
        self.norm.impl = impl

    def forward(self, x_BCHW: Tensor, running: bool) -> Tensor:
        z_BCHW = conv_transpose2d(x_BCHW, self.convtranpose.weight, impl=self.impl)
        if not running:
            y_BCHW: Tensor = self.norm(z_BCHW)
            return y_BCHW
        norm = self.norm
        state = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return fused_bn_act(z_BCHW, *state, None, eps=norm.eps, training=False, impl=self.impl)


class Decoder(nn.Module):
    """Computes a student's earlier maps from its last, with a block for each.

    Args:
        channels: of the student's maps, the first stage's first.
    """

    def __init__(self, channels: Sequence[int], impl: str = "auto") -> None:
        super().__init__()
        backwards = list(reversed(channels))
        self.names = [f"layer{index}" for index in range(len(backwards) - 1)]
        for name, (inputs, outputs) in zip(self.names, pairwise(backwards), strict=True):
            self.add_module(name, DecoderBlock(inputs, outputs, impl))

    def _expand(self, x_BCHW: Tensor, running: bool) -> list[Tensor]:
        maps = []
        for name in self.names:
            x_BCHW = self.get_submodule(name)(x_BCHW, running)
            maps.append(x_BCHW)
        return maps[::-1]

    def forward(self, last_BCHW: Tensor) -> list[Tensor]:
        """The earlier maps, the first stage's first, by batch statistics in training: the decoder learns."""
        return self._expand(last_BCHW, running=False)

    @torch.no_grad()
    def decode(self, last_BCHW: Tensor) -> list[Tensor]:
        """The same by running statistics and without gradient: the student learns."""
        return self._expand(last_BCHW, running=True)


class Squeeze(nn.Module):
    """Depthwise 3x3, BatchNorm, ReLU, then 1x1 to ``outputs`` channels, BatchNorm, ReLU.

    From the leader's last map to all its students' channels this is the *transfusion*.
    """

    def __init__(self, inputs: int, outputs: int, impl: str = "auto") -> None:
        super().__init__()
        self.impl = impl
        self.conv1 = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1_1 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn1_1 = NormAct(outputs)
        self.bn1_1.impl = impl
        for conv in (self.conv1, self.conv1_1):
            # normal(0, sqrt(2 / (k k out))), the depthwise one too.
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def squeeze(self, maps_BCHW: Sequence[Tensor]) -> Tensor:
        """One map from several, concatenated along channels."""
        if is_exactly(self.bn1, nn.BatchNorm2d):
            impl = "auto" if self.impl == "cpp" else self.impl  # the op has no C++ form
            x_BCHW = fusion_step(maps_BCHW, self.conv1.weight, self.bn1, impl=impl)
        else:  # another norm was put in its place, such as sync_bn's
            x_BCHW = F.relu(self.bn1(self.conv1(torch.cat(list(maps_BCHW), dim=1))))
        y_BCHW: Tensor = self.bn1_1(self.conv1_1(x_BCHW))
        return y_BCHW

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.squeeze([x_BCHW])


class Fusion(Squeeze):
    """The students' last maps squeezed into one of ``outputs`` channels, and its classifier."""

    def __init__(self, inputs: int, outputs: int, num_classes: int, impl: str = "auto") -> None:
        super().__init__(inputs, outputs, impl)
        self.fc2 = nn.Linear(outputs, num_classes)

    def fuse(self, maps_BCHW: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The fused map and its logits."""
        fused_BCHW = self.squeeze(maps_BCHW)
        return fused_BCHW, self.fc2(fused_BCHW.mean((2, 3)))
