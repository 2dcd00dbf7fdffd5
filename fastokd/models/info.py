"""What a student counts: parameters, multiply-accumulates, feature width, map shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.models.registry import create_model, model_spec


@dataclass(frozen=True)
class ModelInfo:
    """Counts of one student (``macs``: convolutions and linear layers, one image, forward)."""

    name: str
    params: int
    macs: int
    feature_dim: int
    maps: list[list[int]]


def count_macs(model: nn.Module, x_BCHW: Tensor) -> int:
    """Multiply-accumulates of the convolutions and linear layers in one forward, per image."""
    total = 0

    def count(module: nn.Module, _args: Any, y: Tensor) -> None:
        nonlocal total
        assert isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
        per_output = module.weight.shape[1:].numel()
        if isinstance(module, nn.ConvTranspose2d):
            total += module.weight.numel() * _args[0].shape[2:].numel()
        else:
            total += per_output * y.shape[1:].numel()

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    ]
    try:
        model(x_BCHW)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def model_info(name: str, num_classes: int) -> ModelInfo:
    """Counts the student ``name`` on the meta device: no memory, no arithmetic."""
    size = model_spec(name).input_size
    with torch.device("meta"), torch.no_grad():
        model = create_model(name, num_classes).eval()
        x_BCHW = torch.empty(1, 3, size, size)
        macs = count_macs(model, x_BCHW)
        maps = [list(map_BCHW.shape[1:]) for map_BCHW in model.outputs(x_BCHW).maps]
    params = sum(parameter.numel() for parameter in model.parameters())
    return ModelInfo(name, params, macs, model.feature_dim, maps)
