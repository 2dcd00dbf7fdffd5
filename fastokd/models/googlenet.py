"""GoogLeNet for 32x32 images, with batch norm and two 3x3s in place of a 5x5, as FFSD has it.

Keys are FFSD's (``pre_layers.M``, ``inception_a3.branch3x3.M``, ..., ``linear``).
"""

from __future__ import annotations

from torch import Tensor, nn

from fastokd.models.layers import ConcatChannels, NormAct, init_kaiming_fan_out, numbered
from fastokd.models.registry import register_model
from fastokd.models.student import Student


def _convs(inputs: int, *steps: tuple[int, int], first: int = 0) -> nn.Sequential:
    """Biased convolutions (outputs, kernel), each with norm and ReLU, numbered in steps of three."""
    layers: dict[int, nn.Module] = {}
    for index, (outputs, kernel) in enumerate(steps):
        place = first + 3 * index
        layers[place] = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        layers[place + 1] = NormAct(outputs)
        inputs = outputs
    if first:
        layers = {0: nn.MaxPool2d(3, stride=1, padding=1), **layers}
    return numbered(layers)


class Inception(nn.Module):
    """Four parallel paths, concatenated: 1x1; 1x1 and 3x3; 1x1 and two 3x3; pooling and 1x1."""

    def __init__(
        self, inputs: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int
    ) -> None:
        super().__init__()
        self.branch1x1 = _convs(inputs, (one, 1))
        self.branch3x3 = _convs(inputs, (three[0], 1), (three[1], 3))
        self.branch5x5 = _convs(inputs, (five[0], 1), (five[1], 3), (five[1], 3))
        self.branch_pool = _convs(inputs, (pool, 1), first=1)
        self.concat = ConcatChannels(one, three[1], five[1], pool)
        self.channels = sum(self.concat.widths)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.concat(
            self.branch1x1(x_BCHW),
            self.branch3x3(x_BCHW),
            self.branch5x5(x_BCHW),
            self.branch_pool(x_BCHW),
        )


# Name, 1x1, (reduction, 3x3), (reduction, 5x5), after the pooling: Szegedy et al., Table 1.
INCEPTIONS = (
    ("a3", 64, (96, 128), (16, 32), 32),
    ("b3", 128, (128, 192), (32, 96), 64),
    ("a4", 192, (96, 208), (16, 48), 64),
    ("b4", 160, (112, 224), (24, 64), 64),
    ("c4", 128, (128, 256), (24, 64), 64),
    ("d4", 112, (144, 288), (32, 64), 64),
    ("e4", 256, (160, 320), (32, 128), 128),
    ("a5", 256, (160, 320), (32, 128), 128),
    ("b5", 384, (192, 384), (48, 128), 128),
)


class GoogLeNet(Student):
    """A 3x3 stem of 192 channels and nine inception modules; 3x3 max pooling of stride 2 before the
    third and the eighth. Maps are taken before pooling."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.pre_layers = _convs(3, (192, 3))
        channels = 192
        for name, one, three, five, pool in INCEPTIONS:
            inception = Inception(channels, one, three, five, pool)
            self.add_module(f"inception_{name}", inception)
            channels = inception.channels
        self.maxpool1 = nn.MaxPool2d(3, stride=2, padding=1)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, padding=1)
        self.linear = nn.Linear(channels, num_classes)
        self.chain(
            ("pre_layers",),
            ("inception_a3", "inception_b3"),
            ("maxpool1",),
            tuple(f"inception_{letter}4" for letter in "abcde"),
            ("maxpool2",),
            ("inception_a5", "inception_b5"),
            head="linear",
            feature_dim=channels,
            map_stages=(1, 3, 5),
        )
        init_kaiming_fan_out(self)


register_model(
    "googlenet",
    GoogLeNet,
    input_size=32,
    about="FFSD's GoogLeNet for CIFAR: nine inception modules with batch norm",
)
