"""Calls of the divergences from a target, and the budget that a fast implementation's errors have."""

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


def assert_within_budget(op: str, drawn: Drawn, impl: str, **options: Any) -> None:
    """No further from float64 than plain PyTorch in the same dtype, plus a few roundings."""
    exact_drawn = Drawn(drawn.logits_SBC.double(), drawn.target_SBC.double(), drawn.labels_B)
    ours = outcome(op, drawn, impl, **options)
    plain = outcome(op, drawn, "torch", **options)
    exact = outcome(op, exact_drawn, "torch", **options)
    fp32 = torch.finfo(torch.float32).eps
    # Triton's interpreter, unlike a GPU, adds up a row of classes one after another and cuts a float32 off
    # where it stores a bfloat16.
    interpreted = impl == "triton" and drawn.logits_SBC.device.type == "cpu"
    terms, share = (max(drawn.logits_SBC.shape[2] / 16, 1.0), 2.0) if interpreted else (1.0, 1.0)
    for name, a, b, c in zip(("loss", "gradient"), ours, plain, exact, strict=True):
        assert a.dtype == b.dtype
        error, budget = (a.double() - c).abs(), (b.double() - c).abs()
        rounding = torch.finfo(a.dtype).eps * c.abs()
        # DIST's losses are T^2 less a correlation, DKD's T^2 beta times differences of logs.
        largest = terms * (c.abs().max() if name == "gradient" else 16.0)
        worst = (error - budget.max() - rounding - 8 * fp32 * largest).max().item()
        assert worst <= 0, f"{op} {name}: {worst:.3g} beyond the budget of {budget.max():.3g}"
        rms, allowed = error.square().mean().sqrt(), budget.square().mean().sqrt()
        assert rms <= share * allowed + 2 * fp32 * largest, f"{op} {name}: {rms} of {allowed}"
