"""Calls of the divergences from a target."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastokd.ops.correlation_distillation import correlation_losses
from fastokd.ops.decoupled_distillation import decoupled_losses


class Drawn(NamedTuple):
    """Students, their target or targets, and class ids."""

    logits_SBC: Tensor
    target_SBC: Tensor
    labels_B: Tensor


def draw(
    S: int = 3,
    B: int = 5,
    C: int = 10,
    *,
    targets: int = 1,
    scale: float = 3.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Drawn:
    """Logits of deviation ``scale``; the target is near the students, as when they have learnt."""
    g = torch.Generator().manual_seed(hash((S, B, C, targets)) % 2**31)
    target = scale * torch.randn(targets, B, C, generator=g)
    logits = target + torch.randn(S, B, C, generator=g)
    labels_B = torch.randint(C, (B,), generator=g)
    return Drawn(logits.to(device, dtype), target.to(device, dtype), labels_B.to(device))


OPTIONS: dict[str, dict[str, float]] = {
    "decoupled": {"alpha": 0.7, "beta": 8.0, "temperature": 4.0},
    "correlation": {"beta": 1.5, "gamma": 0.5, "temperature": 2.0},
}


def losses(op: str, drawn: Drawn, impl: str, **options: Any) -> Tensor:
    """``[S]``."""
    options = {**OPTIONS[op], **options, "impl": impl}
    if op == "decoupled":
        return decoupled_losses(*drawn, **options)
    return correlation_losses(drawn.logits_SBC, drawn.target_SBC, **options)


def outcome(op: str, drawn: Drawn, impl: str, incoming: float = 1.0, **options: Any) -> Any:
    """The losses, and the gradient of a weighted sum of them."""
    z_SBC = drawn.logits_SBC.detach().requires_grad_()
    loss_S = losses(op, drawn._replace(logits_SBC=z_SBC), impl, **options)
    weight_S = torch.arange(1, len(loss_S) + 1, dtype=loss_S.dtype, device=loss_S.device)
    (gradient,) = torch.autograd.grad((loss_S * weight_S * incoming).sum(), z_SBC)
    assert gradient.dtype == z_SBC.dtype
    return loss_S.detach(), gradient
