"""Residual networks: He et al.'s basic blocks, OKDDip's bottleneck forms, torchvision's 18 and 34.

Keys are torchvision's (``conv1``, ``bn1``, ``layerN.M.conv1``, ``downsample.0``, ``fc``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from fastokd.models.layers import NormAct, conv3x3, init_kaiming_fan_out
from fastokd.models.registry import register_model
from fastokd.models.student import Student


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """The 1x1 shortcut where a block changes its shape, or None for the identity."""
    if stride == 1 and inputs == outputs:
        return None
    conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
    return nn.Sequential(conv, NormAct(outputs, relu=False))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the stride sits on the first."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = NormAct(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = NormAct(outputs)
        self.downsample = projection(inputs, outputs, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        shortcut_BCHW = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        return self.bn2(self.conv2(self.bn1(self.conv1(x_BCHW))), shortcut_BCHW)


class Bottleneck(nn.Module):
    """1x1 to ``inner`` channels, 3x3 (with the stride), 1x1 to ``outputs``, and a shortcut."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = NormAct(inner)
        self.conv2 = conv3x3(inner, inner, stride)
        self.bn2 = NormAct(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = NormAct(outputs)
        self.downsample = projection(inputs, outputs, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        shortcut_BCHW = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        y_BCHW = self.bn2(self.conv2(self.bn1(self.conv1(x_BCHW))))
        return self.bn3(self.conv3(y_BCHW), shortcut_BCHW)


class ResNet(Student):
    """A stem, a stage for each entry of ``blocks``, a linear classifier.

    Args:
        num_classes: C.
        blocks: the number of blocks of each stage.
        base: width of the first stage; it doubles from stage to stage.
        widen: None for basic blocks; else bottlenecks, whose inner width is ``widen`` times the
            stage's and whose output is 4 times it (OKDDip's ResNet-110 and WRN-20-8).
        imagenet: a 7x7 stem of stride 2 with pooling, and branches of the last two stages; else a 3x3
            stem, and branches of the last stage.
        branch_from: the first stage that branches don't share, the stem being stage 0; 0: as published.
    """

    def __init__(
        self,
        num_classes: int,
        blocks: tuple[int, ...],
        base: int = 16,
        widen: int | None = None,
        imagenet: bool = False,
        branch_from: int = 0,
    ) -> None:
        super().__init__()
        stem: tuple[str, ...] = ("conv1", "bn1")
        if imagenet:
            self.conv1 = nn.Conv2d(3, base, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = conv3x3(3, base)
        self.bn1 = NormAct(base)
        if imagenet:
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
            stem = (*stem, "maxpool")
        channels = base
        for index, count in enumerate(blocks):
            width = base * 2**index
            outputs = width if widen is None else 4 * width
            layers = nn.Sequential()
            for block in range(count):
                stride = 2 if index and not block else 1
                if widen is None:
                    layers.append(BasicBlock(channels, outputs, stride))
                else:
                    layers.append(Bottleneck(channels, widen * width, outputs, stride))
                channels = outputs
            self.add_module(f"layer{index + 1}", layers)
        self.fc = nn.Linear(channels, num_classes)
        self.chain(
            stem,
            *((f"layer{index + 1}",) for index in range(len(blocks))),
            head="fc",
            feature_dim=channels,
            branch_from=branch_from or (-2 if imagenet else -1),
        )
        init_kaiming_fan_out(self)


def _register(name: str, about: str, *blocks: int, size: int = 32, **form: Any) -> None:
    register_model(name, partial(ResNet, blocks=blocks, **form), input_size=size, about=about)


for _depth in (8, 14, 20, 32, 44, 56, 110):
    _n = (_depth - 2) // 6
    _name = "resnet110_basic" if _depth == 110 else f"resnet{_depth}"
    _register(_name, f"CIFAR ResNet-{_depth}, basic blocks {_n}-{_n}-{_n}", _n, _n, _n)
_register("resnet110", "OKDDip's ResNet-110: bottlenecks 12-12-12", 12, 12, 12, widen=1)
_register("wrn_20_8", "OKDDip's WRN-20-8: bottlenecks 2-2-2, inner width 8 times", 2, 2, 2, widen=8)
_register("resnet18", "torchvision's ResNet-18", 2, 2, 2, 2, size=224, base=64, imagenet=True)
_register("resnet34", "torchvision's ResNet-34", 3, 4, 6, 3, size=224, base=64, imagenet=True)
