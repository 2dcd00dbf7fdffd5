"""VGG-16 for 32x32 images, with batch norm, as OKDDip has it.

Keys are OKDDip's (``conv1``, ``bn1``, ``conv2``, ``bn2``, ``layerN.M``, ``classifier.M``).
"""

from __future__ import annotations

from functools import partial

from torch import nn

from fastokd.models.layers import Dropout, NormAct, conv3x3, init_kaiming_fan_out, numbered
from fastokd.models.registry import register_model
from fastokd.models.student import Student


def _stage(inputs: int, outputs: int, convs: int) -> nn.Sequential:
    layers: dict[int, nn.Module] = {}
    for index in range(convs):
        layers[3 * index] = conv3x3(inputs, outputs, bias=True)
        layers[3 * index + 1] = NormAct(outputs)
        inputs = outputs
    return numbered(layers)


class VGG(Student):
    """Five groups of biased 3x3 convolutions, each with 2x2 max pooling after it, and 512-512-512-C.

    Maps are the outputs of the last four groups before pooling. A branch has the last group; the pooling
    before it belongs to the trunk, as published.

    Args:
        num_classes: C.
        convs: convolutions in each group.
        dropout: probability of the classifier's two dropouts: 0 in the papers' baseline and
            network forms, 0.5 in their branch forms (``ModelSpec.branch_options``).
    """

    def __init__(
        self, num_classes: int, convs: tuple[int, ...] = (2, 2, 3, 3, 3), dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 64, bias=True)
        self.bn1 = NormAct(64)
        self.conv2 = conv3x3(64, 64, bias=True)
        self.bn2 = NormAct(64)
        channels = 64
        stages: list[tuple[str, ...]] = [("conv1", "bn1", "conv2", "bn2", "pool0")]
        self.pool0 = nn.MaxPool2d(2)
        for index, outputs in enumerate((128, 256, 512, 512), start=1):
            self.add_module(f"layer{index}", _stage(channels, outputs, convs[index]))
            self.add_module(f"pool{index}", nn.MaxPool2d(2))
            stages += [(f"layer{index}",), (f"pool{index}",)]
            channels = outputs
        self.classifier = nn.Sequential(
            nn.Linear(512, 512),
            nn.ReLU(),
            Dropout(dropout, 512),
            nn.Linear(512, 512),
            nn.ReLU(),
            Dropout(dropout, 512),
            nn.Linear(512, num_classes),
        )
        self.chain(
            *stages,
            head="classifier",
            feature_dim=512,
            branch_from=-2,
            map_stages=(1, 3, 5, 7),
        )
        init_kaiming_fan_out(self, zero_bias=True)
        for module in self.classifier:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)


for _depth, _convs in ((16, (2, 2, 3, 3, 3)), (19, (2, 2, 4, 4, 4))):
    register_model(
        f"vgg{_depth}",
        partial(VGG, convs=_convs),
        input_size=32,
        about=f"OKDDip's VGG-{_depth} with batch norm for CIFAR",
        branch_options={"dropout": 0.5},
    )
