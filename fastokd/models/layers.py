"""The layers that a cohort's engine may swap for fused ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NormAct(nn.BatchNorm2d):
    """BatchNorm, then an optional residual, then an optional ReLU, as one module.

    It holds exactly the state of ``nn.BatchNorm2d`` (so checkpoints keep their plain keys) and is
    the one hook through which an engine swaps the three operations for one: set ``fused`` to a
    callable ``(module, x_BCHW, residual_BCHW | None) -> y_BCHW``.
    """

    fused: Callable[[NormAct, Tensor, Tensor | None], Tensor] | None = None

    def __init__(self, channels: int, *, relu: bool = True, momentum: float = 0.1) -> None:
        super().__init__(channels, momentum=momentum)
        self.relu = relu

    def forward(self, x_BCHW: Tensor, residual_BCHW: Tensor | None = None) -> Tensor:
        if self.fused is not None:
            return self.fused(self, x_BCHW, residual_BCHW)
        y_BCHW = super().forward(x_BCHW)
        if residual_BCHW is not None:
            y_BCHW = y_BCHW + residual_BCHW
        return F.relu(y_BCHW) if self.relu else y_BCHW


class ConcatChannels(nn.Module):
    """Concatenation along channels: a module, so that an engine which stacks students along
    channels can interleave them right."""

    def forward(self, *maps_BCHW: Tensor) -> Tensor:
        return torch.cat(maps_BCHW, dim=1)


class GlobalAveragePool(nn.Module):
    """``[B, C, H, W] -> [B, C]``."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.mean((2, 3))
