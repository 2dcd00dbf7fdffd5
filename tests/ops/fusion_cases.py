"""Drawn calls of the fusion step, and the budget that a fast implementation's errors have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastokd.ops import fusion_step
from tests.ops.poison import poisoned


@dataclass(frozen=True)
class Step:
    """The arguments of one call and the gradient that comes back."""

    maps: list[Tensor]
    weight: Tensor
    bn: nn.BatchNorm2d
    dy: Tensor

    def to(self, dtype: torch.dtype) -> Step:
        """The same numbers, all in ``dtype``."""
        maps = [x.to(dtype) for x in self.maps]
        return Step(maps, self.weight.to(dtype), copied(self.bn).to(dtype), self.dy.to(dtype))

    def run(self, impl: str, need_maps: bool = True) -> dict[str, Tensor]:
        """y, the gradients, and the norm's state after the step, which starts from this one's."""
        bn = copied(self.bn)
        maps = [x.detach().requires_grad_(need_maps) for x in self.maps]
        weight = self.weight.detach().requires_grad_()
        y = fusion_step(maps, weight, bn, impl=impl)
        leaves = {"weight": weight, "gamma": bn.weight, "beta": bn.bias}
        leaves |= {f"map{i}": x for i, x in enumerate(maps) if need_maps}
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy)
        for leaf, gradient in zip(leaves.values(), gradients, strict=True):
            assert gradient.dtype == leaf.dtype
            assert gradient.shape == leaf.shape
        found = {f"grad_{n}": g for n, g in zip(leaves, gradients, strict=True)}
        return {"y": y.detach(), **found, **{n: b.clone() for n, b in bn.named_buffers()}}


def copied(bn: nn.BatchNorm2d) -> nn.BatchNorm2d:
    other = nn.BatchNorm2d(bn.num_features, eps=bn.eps, momentum=bn.momentum).to(bn.weight)
    other.load_state_dict(bn.state_dict())
    return other


def draw(
    m: int = 2,
    B: int = 3,
    C: int = 4,
    H: int = 5,
    W: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    offset: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Step:
    """Channels-last maps in ``dtype``; the norm and the weight in float32.

    No gradient comes back where y is within rounding of the ReLU's kink: it may fall on either side.
    """
    g = torch.Generator().manual_seed(hash((m, B, C, H, W, seed)) % 2**31)

    def last(channels: int, dtype: torch.dtype) -> Tensor:
        x_BCHW = torch.randn(B, channels, H, W, generator=g) + offset
        return x_BCHW.to(device, dtype).contiguous(memory_format=torch.channels_last)

    K = m * C
    bn = nn.BatchNorm2d(K).to(device)
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean):
            tensor.copy_(torch.randn(K, generator=g))
    maps = [last(C, dtype) for _ in range(m)]
    weight = torch.randn(K, 1, 3, 3, generator=g).to(device)
    offset = 0.0
    dy = last(K, dtype)
    with poisoned(False):
        normal = copied(bn).double()(
            F.conv2d(torch.cat(maps, 1).double(), weight.double(), padding=1, groups=K)
        )
    sure = normal.abs() > 16 * torch.finfo(dtype).eps * (1 + normal.abs())
    return Step(maps, weight, bn, torch.where(sure, dy, 0.0))


def assert_within_budget(step: Step, impl: str, need_maps: bool = True) -> None:
    """Neither one number nor the whole is further from float64 than the torch form's, all of it in
    the maps' dtype, plus a rounding or two of what it is the sum of."""
    dtype = step.maps[0].dtype
    ours = step.run(impl, need_maps)
    with poisoned(False):
        theirs = step.to(dtype).run("torch", need_maps)
        exact = step.to(torch.float64).run("torch", need_maps)
    assert ours.keys() == exact.keys()
    rounding = torch.finfo(dtype).eps
    for name, reference in exact.items():
        error, budget = ((found[name].double() - reference).abs() for found in (ours, theirs))
        scale = reference.abs().max() + sums(step, name)
        worst = (error - budget).max().item()
        assert worst <= 8 * rounding * scale, f"{name}: {worst:.3g} beyond the budget"
        limit = 1.5 * rms(budget) + 4 * rounding * scale
        assert rms(error) <= limit, f"{name}: RMS {rms(error):.3g}, the limit {limit:.3g}"


def sums(step: Step, name: str) -> float:
    """A gradient of a parameter is a sum over batch and pixels that partly cancels."""
    count = step.dy.numel() / step.dy.shape[1]
    return float(count**0.5) if name in ("grad_weight", "grad_gamma", "grad_beta") else 0.0


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()
