"""Counts of a student: parameters, multiply-accumulates, feature width, map shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.models.registry import create_model, found_once, input_size
from fastokd.models.student import Student


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


def model_info(name: str, num_classes: int, **options: Any) -> ModelInfo:
    """Counts of the student ``name``, computed on the meta device.

    ``options`` are the model's own, as :func:`create_model` takes them.
    """
    params, macs = counts(name, num_classes, options, input_size(name, options))
    model, x_BCHW = _on_meta(name, num_classes, options, input_size(name, options))
    with torch.no_grad():
        maps = [list(map_BCHW.shape[1:]) for map_BCHW in model.outputs(x_BCHW).maps]
    return ModelInfo(name, params, macs, model.feature_dim, maps)


@found_once
def counts(name: str, num_classes: int, options: dict[str, Any], size: int) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one image of ``size``."""
    model, x_BCHW = _on_meta(name, num_classes, options, size)
    with torch.no_grad():
        macs = count_macs(model, x_BCHW)
    return sum(parameter.numel() for parameter in model.parameters()), macs


@found_once
def map_shapes(
    name: str, num_classes: int, options: dict[str, Any], size: int
) -> tuple[tuple[int, int, int], ...]:
    """(channels, height, width) of each map of ``name`` over images of ``size``."""
    model, x_BCHW = _on_meta(name, num_classes, options, size)
    with torch.no_grad():
        maps = model.outputs(x_BCHW).maps
    return tuple((m.shape[1], m.shape[2], m.shape[3]) for m in maps)


@found_once
def trunk_shape(
    name: str, num_classes: int, size: int | None = None, /, **options: Any
) -> tuple[int, ...]:
    """(channels, height, width), or (tokens, width), of the input of a branch of ``name`` for images of
    ``size`` (None: the one that it was published for).

    Raises:
        UserError: the model can't be split; another library's needs the option ``split_at``.
    """
    model, x_BCHW = _on_meta(name, num_classes, options, size or input_size(name, options))
    with torch.no_grad():
        trunk_BCHW, _ = model.trunk(x_BCHW, model.branch_from)
    return tuple(trunk_BCHW.shape[1:])


def _on_meta(
    name: str, num_classes: int, options: dict[str, Any], size: int
) -> tuple[Student, Tensor]:
    """The student on the meta device, in eval mode, and one image."""
    with torch.device("meta"):
        model = create_model(name, num_classes, **options).eval()
        return model, torch.empty(1, 3, size, size)
