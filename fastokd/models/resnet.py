"""Residual networks: He et al.'s basic-block form for CIFAR.

Keys are torchvision's (``conv1``, ``bn1``, ``layerN.M.conv1``, ``downsample.0``, ``fc``).
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from fastokd.models.layers import NormAct
from fastokd.models.registry import register_model
from fastokd.models.student import Student


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """The 1x1 shortcut where a block changes its shape, or None where the identity serves."""
    if stride == 1 and inputs == outputs:
        return None
    conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
    return nn.Sequential(conv, NormAct(outputs, relu=False))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the stride sits on the first."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = NormAct(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = NormAct(width)
        self.downsample = projection(inputs, width, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        shortcut_BCHW = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        return self.bn2(self.conv2(self.bn1(self.conv1(x_BCHW))), shortcut_BCHW)


def init_kaiming_fan_out(model: nn.Module) -> None:
    """Convolutions Kaiming normal over their fan-out, norms one and zero, linears as torch's."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class CifarResNet(Student):
    """Three stages of ``blocks`` basic blocks, 16, 32 and 64 wide, for 32x32 images.

    The depth is ``6 * blocks + 2``. Shortcuts that change shape are 1x1 convolutions.
    """

    def __init__(self, num_classes: int, blocks: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 16)
        self.bn1 = NormAct(16)
        width_in = 16
        for index, width in enumerate((16, 32, 64), start=1):
            layers = []
            for block in range(blocks):
                layers.append(BasicBlock(width_in, width, 2 if index > 1 and block == 0 else 1))
                width_in = width
            self.add_module(f"layer{index}", nn.Sequential(*layers))
        self.fc = nn.Linear(64, num_classes)
        self.chain(
            ("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), head="fc", feature_dim=64
        )
        init_kaiming_fan_out(self)


for depth, blocks in ((8, 1), (20, 3), (32, 5), (56, 9)):
    register_model(
        f"resnet{depth}",
        partial(CifarResNet, blocks=blocks),
        input_size=32,
        about=f"CIFAR ResNet-{depth}, basic blocks {blocks}-{blocks}-{blocks}",
    )
