"""The two DenseNet-40-12s: OKDDip's (bottlenecks, compression 0.5) and FFSD's (neither).

They are different networks, each with its authors' keys.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastokd.models.layers import ConcatChannels, NormAct, conv3x3, init_kaiming_fan_out
from fastokd.models.registry import register_model
from fastokd.models.student import Student

GROWTH = 12


class DenseLayer(nn.Module):
    """Norm, ReLU, 3x3 to ``GROWTH`` channels, concatenated to its input (FFSD's)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.bn1 = NormAct(inputs)
        self.conv1 = conv3x3(inputs, GROWTH)
        self.concat = ConcatChannels(inputs, GROWTH)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.concat(x_BCHW, self.conv1(self.bn1(x_BCHW)))


class BottleneckLayer(nn.Module):
    """Norm, ReLU, 1x1 to four times ``GROWTH``, norm, ReLU, 3x3, concatenated to its input (OKDDip's)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm1 = NormAct(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * GROWTH, 1, bias=False)
        self.norm2 = NormAct(4 * GROWTH)
        self.conv2 = conv3x3(4 * GROWTH, GROWTH)
        self.concat = ConcatChannels(inputs, GROWTH)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.conv2(self.norm2(self.conv1(self.norm1(x_BCHW))))
        return self.concat(x_BCHW, y_BCHW)


def _named(**layers: nn.Module) -> nn.Sequential:
    chain = nn.Sequential()
    for name, layer in layers.items():
        chain.add_module(name, layer)
    return chain


class DenseNetBC(Student):
    """OKDDip's DenseNet-40-12: three blocks of 6 bottleneck layers, compression 0.5 (0.18M).

    A branch has the last block and the final norm; the transition before them belongs to the trunk.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        channels = 2 * GROWTH
        self.features = _named(conv0=conv3x3(3, channels))
        for block in (1, 2, 3):
            layers = {}
            for layer in range(1, 7):
                layers[f"denselayer{layer}"] = BottleneckLayer(channels)
                channels += GROWTH
            self.features.add_module(f"denseblock{block}", _named(**layers))
            if block < 3:
                transition = _named(
                    norm=NormAct(channels),
                    conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
                    pool=nn.AvgPool2d(2),
                )
                self.features.add_module(f"transition{block}", transition)
                channels //= 2
        self.features.add_module("norm_final", NormAct(channels))
        self.classifier = nn.Linear(channels, num_classes)
        self.chain(
            ("features.conv0",),
            ("features.denseblock1",),
            ("features.transition1",),
            ("features.denseblock2",),
            ("features.transition2",),
            ("features.denseblock3", "features.norm_final"),
            head="classifier",
            feature_dim=channels,
            map_stages=(1, 3, 5),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)


class DenseNet(Student):
    """FFSD's DenseNet-40-12: three blocks of 12 plain layers, no compression (1.1M)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        channels = 2 * GROWTH
        self.conv1 = conv3x3(3, channels)
        for block in (1, 2, 3):
            layers = nn.Sequential()
            for _ in range(12):
                layers.append(DenseLayer(channels))
                channels += GROWTH
            self.add_module(f"dense{block}", layers)
            if block < 3:
                transition = _named(
                    bn1=NormAct(channels),
                    conv1=nn.Conv2d(channels, channels, 1, bias=False),
                    pool=nn.AvgPool2d(2),
                )
                self.add_module(f"trans{block}", transition)
        self.bn = NormAct(channels)
        self.fc = nn.Linear(channels, num_classes)
        self.chain(
            ("conv1",),
            ("dense1",),
            ("trans1",),
            ("dense2",),
            ("trans2",),
            ("dense3", "bn"),
            head="fc",
            feature_dim=channels,
            map_stages=(1, 3, 5),
        )
        # FFSD initialises by fan-out, OKDDip by fan-in.
        init_kaiming_fan_out(self)


register_model(
    "densenet_40_12",
    DenseNetBC,
    input_size=32,
    about="OKDDip's DenseNet-40-12: bottleneck layers, 6 a block, compression 0.5",
)
register_model(
    "densenet_40_12_uncompressed",
    DenseNet,
    input_size=32,
    about="FFSD's DenseNet-40-12: plain layers, 12 a block, no compression",
)
