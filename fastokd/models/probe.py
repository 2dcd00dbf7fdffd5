"""Finds the features and maps of another library's classifier, by one forward on the meta device.

The network must be a module ``[B, 3, H, W] -> [B, C]`` that ends in a linear layer or a convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastokd.errors import UserError
from fastokd.models.split import enclosing

MAPS = 4
# FFSD's map losses need a third of a map's positions to be at least one.
SMALLEST_MAP = 3
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)
# Modules that make no map, but may get attention matrices.
PASSING = (*DROPOUTS, nn.Identity, nn.Softmax)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Probe:
    """Where features and maps are.

    ``features_at``: the module whose input is the feature: the last layer with C outputs, or the
    dropout before it; ``channels_first``: whether that input is ``[B, D, H, W]`` where it has
    positions. ``maps_at``: the modules whose outputs are maps, largest first. ``writes_input``: the
    network changes its images in place. ``classifier``: that last layer; ``stages``: what runs before
    it, in the order of completion, cut after each of the maps; the last stage has no map.
    """

    features_at: str
    channels_first: bool
    feature_dim: int
    maps_at: tuple[str, ...]
    writes_input: bool
    classifier: str
    stages: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Call:
    path: str
    module: nn.Module
    input: Any
    output: Any


def probe(
    net: nn.Module, name: str, num_classes: int, size: int, hidden: frozenset[str] = frozenset()
) -> Probe:
    """Runs ``net`` once on the meta device, in eval mode, and finds its classifier and maps.

    Args:
        net: the classifier; it isn't changed.
        name: for messages.
        num_classes: C.
        size: height and width of the images.
        hidden: modules that a split goes through: they won't be called, so hooks on them won't run.

    Raises:
        UserError: the network doesn't run at that size, doesn't give ``[B, C]``, or has no layer
            with C outputs.
    """
    calls, logits, writes_input = _watch(net, name, size)
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        raise UserError(
            f"{name} doesn't give [B, {num_classes}] logits but {_shape(logits)}: "
            "only plain classifiers can be students"
        )
    places = [
        index
        for index, call in enumerate(calls)
        if isinstance(call.module, (nn.Linear, nn.Conv2d))
        and call.module.weight.shape[0] == num_classes
    ]
    if not places:
        raise UserError(
            f"{name} has no linear layer or convolution with {num_classes} outputs to take the "
            "features from: write a Student and register it with register_model"
        )
    last = calls[places[-1]]
    at = last.path
    before = calls[places[-1] - 1] if places[-1] else last
    if isinstance(before.module, DROPOUTS) and before.output.shape == last.input.shape:
        # Features without the dropout's noise.
        at = before.path
    channels_first = isinstance(last.module, nn.Conv2d)
    dim = pool_features(last.input, channels_first).shape[1]
    body = calls[: places[-1]]
    maps_at = _maps(net, body, size, hidden)
    paths = [call.path for call in body]
    ends = [0, *(1 + max(i for i, path in enumerate(paths) if path == end) for end in maps_at)]
    stages = (tuple(paths[i:j]) for i, j in pairwise([*ends, len(paths)]))
    return Probe(at, channels_first, dim, maps_at, writes_input, last.path, tuple(stages))


def pool_features(x: Tensor, channels_first: bool) -> Tensor:
    """The classifier's input as ``[B, D]``: averaged over positions or tokens, if it has any."""
    if x.dim() == 2:
        return x
    return x.mean((2, 3)) if channels_first else x.flatten(1, -2).mean(1)


def _watch(net: nn.Module, name: str, size: int) -> tuple[list[_Call], Any, bool]:
    """Every call of a submodule in the order of completion, the network's output, and whether it
    wrote to its input."""
    calls: list[_Call] = []

    def listen(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls.append(_Call(path, module, args[0] if args else None, output))

        return hook

    hooks = [
        module.register_forward_hook(listen(path)) for path, module in net.named_modules() if path
    ]
    modes = {module: module.training for module in net.modules()}
    net.eval()
    meta = {key: value.to("meta") for key, value in _state(net).items()}
    try:
        with torch.device("meta"), torch.no_grad():
            images = torch.empty(2, 3, size, size)
            output = torch.func.functional_call(net, meta, (images,))
    except Exception as error:
        # The network's own code ran: whatever it raised is about the size or its options.
        raise UserError(f"{name} doesn't run on 3x{size}x{size} images: {error}") from error
    finally:
        for handle in hooks:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return calls, output, images._version > 0


def _state(net: nn.Module) -> dict[str, Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def _maps(net: nn.Module, calls: list[_Call], size: int, hidden: frozenset[str]) -> tuple[str, ...]:
    """The last module at each spatial size, for the smallest four sizes, largest first.

    Only blocks count, that is, modules whose parents are plain containers. A size counts only if every
    smaller one comes after it (unlike attention matrices and upsampling), and if it is about twice the
    next (else the network has its maps in another layout). There are two maps at least, or none.
    """
    found: dict[int, tuple[int, str]] = {}
    for index, call in enumerate(calls):
        if call.path in hidden or isinstance(call.module, PASSING) or not _is_block(net, call.path):
            continue
        if not isinstance(call.output, Tensor) or call.output.dim() != 4:
            continue
        batch, _, height, width = call.output.shape
        if batch == 2 and height == width <= size and height * width >= SMALLEST_MAP:
            found[height] = (index, call.path)
    paths: list[str] = []
    first, smaller = len(calls), 0
    for height in sorted(found):
        index, path = found[height]
        if paths and height > 2.5 * smaller:
            break
        if index < first:
            paths.append(path)
            first, smaller = index, height
    return tuple(reversed(paths[:MAPS])) if len(paths) > 1 else ()


def _is_block(net: nn.Module, path: str) -> bool:
    """Whether all parents of ``path`` are plain containers (their subclasses are blocks)."""
    parents = enclosing(path)
    return all(type(net.get_submodule(parent)) in CONTAINERS for parent in parents)


def _shape(output: Any) -> str:
    return str(list(output.shape)) if isinstance(output, Tensor) else f"a {type(output).__name__}"
