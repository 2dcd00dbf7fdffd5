"""Wide residual networks (pre-activation): FFSD's form and Zagoruyko and Komodakis's own.

Keys are FFSD's (``conv1``, ``layerN.M.bn1``, ``shortcut.0``, ``bn1``, ``linear``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from fastokd.models.layers import NormAct, conv3x3, init_kaiming_fan_out
from fastokd.models.registry import register_model
from fastokd.models.student import Student


class WideBlock(nn.Module):
    """Norm, ReLU, 3x3, norm, ReLU, 3x3, and a shortcut that is a 1x1 where the shape changes.

    FFSD's form has biased convolutions, the stride on the second one, and a shortcut from the
    block's input; the canonical form has no biases, the stride on the first, and its 1x1 shortcut
    starts after the first norm and ReLU.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, canonical: bool) -> None:
        super().__init__()
        first, second = (stride, 1) if canonical else (1, stride)
        bias = not canonical
        self.canonical = canonical
        self.bn1 = NormAct(inputs)
        self.conv1 = conv3x3(inputs, outputs, first, bias=bias)
        self.bn2 = NormAct(outputs)
        self.conv2 = conv3x3(outputs, outputs, second, bias=bias)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=bias)
            self.shortcut = nn.Sequential(conv)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        active_BCHW = self.bn1(x_BCHW)
        y_BCHW = self.conv2(self.bn2(self.conv1(active_BCHW)))
        if self.shortcut is None:
            return y_BCHW + x_BCHW
        return y_BCHW + self.shortcut(active_BCHW if self.canonical else x_BCHW)


class WideResNet(Student):
    """Three stages of ``(depth - 4) / 6`` blocks, 16, 32 and 64 times ``widen`` wide.

    The last map is after the final norm, whose momentum is 0.9 in FFSD's form.

    Args:
        num_classes: C.
        depth: convolutions in all; ``widen``: the width over ResNet's.
        canonical: Zagoruyko and Komodakis's form in place of FFSD's.
        branch_from: the first stage that branches don't share, the stem being stage 0; 0: as published.
    """

    def __init__(
        self,
        num_classes: int,
        depth: int,
        widen: int,
        canonical: bool = False,
        branch_from: int = 0,
    ) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = conv3x3(3, 16, bias=not canonical)
        channels = 16
        for index in range(3):
            outputs = 16 * 2**index * widen
            layers = nn.Sequential()
            for block in range(blocks):
                stride = 2 if index and not block else 1
                layers.append(WideBlock(channels, outputs, stride, canonical))
                channels = outputs
            self.add_module(f"layer{index + 1}", layers)
        self.bn1 = NormAct(channels, momentum=0.1 if canonical else 0.9)
        self.linear = nn.Linear(channels, num_classes)
        self.chain(
            ("conv1",),
            ("layer1",),
            ("layer2",),
            ("layer3", "bn1"),
            head="linear",
            feature_dim=channels,
            branch_from=branch_from or -1,
        )
        init_kaiming_fan_out(self)


def _register(name: str, about: str, **form: Any) -> None:
    register_model(name, partial(WideResNet, **form), input_size=32, about=about)


for _depth, _widen in ((16, 2), (40, 2)):
    _about = f"FFSD's WRN-{_depth}-{_widen}: biased convolutions, stride on the second"
    _register(f"wrn_{_depth}_{_widen}", _about, depth=_depth, widen=_widen)
for _depth, _widen in ((16, 2), (40, 1), (40, 2), (28, 4), (28, 10)):
    _about = f"WRN-{_depth}-{_widen} of Zagoruyko and Komodakis"
    _register(f"wrn_{_depth}_{_widen}_basic", _about, depth=_depth, widen=_widen, canonical=True)
