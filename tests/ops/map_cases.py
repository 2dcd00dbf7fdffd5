"""Drawn calls of the ops on maps, and the budget that a fast implementation's errors have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastokd import ops
from tests.ops.poison import poisoned

LOSSES: dict[str, Callable[..., Tensor]] = {
    "attention": ops.attention_transfer,
    "feature": ops.feature_transfer,
    "diversity": ops.attention_diversity,
}
OPS: dict[str, Callable[..., Tensor]] = {
    **LOSSES,
    "map": ops.attention_map,
    "shifted": ops.shifted_map,
}
LAYOUTS = {"last": torch.channels_last, "first": torch.contiguous_format}


def draw(
    B: int = 3,
    C: int = 4,
    H: int = 3,
    W: int = 5,
    *,
    dtype: torch.dtype = torch.float64,
    layout: str = "first",
    relu: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Two maps; ``relu`` cuts them as a network's are, so that whole pixels are zero where C is 1."""
    g = torch.Generator().manual_seed(hash((B, C, H, W, seed)) % 2**31)
    maps = torch.randn(2, B, C, H, W, generator=g, dtype=torch.float64)
    # Where a map looks differs from pixel to pixel, and its strength from sample to sample.
    maps *= torch.rand(2, B, 1, H, W, generator=g) + 0.2
    maps *= 3 * torch.rand(2, B, 1, 1, 1, generator=g) + 0.1
    x, y = (maps.relu() if relu else maps).to(device, dtype)
    return tuple(m.contiguous(memory_format=LAYOUTS[layout]) for m in (x, y))  # type: ignore[return-value]


def run(
    op: str,
    x: Tensor,
    y: Tensor,
    impl: str,
    *,
    asks: tuple[bool, bool] = (True, True),
    incoming: float = 1.0,
) -> dict[str, Tensor]:
    """The result and the gradients that are asked for and there."""
    # Detached, not cloned: the strides are part of the case.
    leaves = [m.detach().requires_grad_(a) for m, a in zip((x, y), asks, strict=True)]
    if op == "shifted":
        return {"result": OPS[op](leaves[1], impl=impl)}
    result = OPS[op](*(leaves[:1] if op == "map" else leaves), impl=impl)
    found = {"result": result.detach()}
    names = [n for n, a in zip(("x", "y"), asks, strict=True) if a]
    if op in ("map", "diversity"):
        names = [n for n in names if n == "x"]
    if names:
        g = torch.Generator().manual_seed(1)
        by = torch.randn(result.shape, generator=g) if op == "map" else torch.ones(())
        gradients = torch.autograd.grad(
            result,
            [leaves[n == "y"] for n in names],
            (incoming * by).to(result),
            allow_unused=True,
        )
        for name, gradient in zip(names, gradients, strict=True):
            assert gradient is not None
            assert gradient.dtype == leaves[name == "y"].dtype
            found[f"grad_{name}"] = gradient
    return found


def assert_within_budget(op: str, x: Tensor, y: Tensor, impl: str, **options: Any) -> None:
    """Neither one element nor the whole is further from float64 than the torch form's in the same
    dtype, plus a rounding or two of what it is the difference of; zeros for small gradients would be
    far from it."""
    ours = run(op, x, y, impl, **options)
    with poisoned(False):
        theirs = run(op, x, y, "torch", **options)
        exact = run(op, x.double(), y.double(), "torch", **options)
    assert ours.keys() == exact.keys()
    fp32 = torch.finfo(torch.float32).eps
    for name, reference in exact.items():
        if not reference.numel():
            assert ours[name].shape == reference.shape
            continue
        assert ours[name].dtype == theirs[name].dtype
        error = (ours[name].double() - reference).abs()
        budget = (theirs[name].double() - reference).abs()
        rounding = torch.finfo(ours[name].dtype).eps
        tolerance = 8 * fp32 * reference.abs().max() + rounding * reference.abs()
        whole = reference
        if name.startswith("grad"):
            whole = reference.abs() + minuend(op, x, y, name[-1], options.get("incoming", 1.0))
            tolerance = tolerance + 4 * fp32 * whole
        worst = (error - budget - tolerance).max().item()
        assert worst <= 0, f"{op} {name}: {worst:.3g} beyond the budget of {budget.max():.3g}"
        # Triton's interpreter, unlike a GPU, cuts a float32 off where it stores a bfloat16.
        share = 1 / 2 if impl == "triton" else 1 / 4
        limit = 1.5 * rms(budget) + 3 * fp32 * rms(whole) + share * rounding * rms(reference)
        assert rms(error) <= limit, f"{op} {name}: RMS {rms(error):.3g}, the limit {limit:.3g}"


def minuend(op: str, x: Tensor, y: Tensor, by: str, incoming: float) -> Tensor:
    """How large the gradient in x or y is before its part along the vector itself is taken off.

    Where the maps are far apart in length, as a map and its target are, little is left after that:
    no arithmetic in fp32 knows the rest better than a rounding of this.
    """
    x, y = (y.double(), x.double()) if by == "y" else (x.double(), y.double())
    B, C = x.shape[:2]
    if op == "feature":
        u_BN, v_BN = (torch.nn.functional.normalize(m.flatten(1), eps=1e-12) for m in (x, y))
        norm_B = x.flatten(1).norm(dim=1).clamp_min(1e-12)
        terms_BN = 2 * (u_BN.abs() + v_BN.abs()) / (max(u_BN.numel(), 1) * norm_B[:, None])
        return (incoming * terms_BN).abs().view_as(x)
    u_BP, norm_B = ops.attention_map(x, impl="torch"), x.square().mean(1).flatten(1).norm(dim=1)
    if op == "map":
        g_BP = torch.ones_like(u_BP)
    else:
        other_BP = target(y) if op == "diversity" else ops.attention_map(y, impl="torch")
        g_BP = 2 * (u_BP.abs() + other_BP.abs()) / max(u_BP.numel(), 1)
    per_pixel_BP = 2 / C * g_BP / norm_B.clamp_min(1e-12)[:, None]
    return (incoming * per_pixel_BP).abs().view(B, 1, *x.shape[2:]) * x.abs()


def target(y: Tensor) -> Tensor:
    """FFSD's target as its definition reads, by sorting."""
    energy_BP = y.square().mean(1).flatten(1)
    r_B1 = energy_BP.norm(dim=1, keepdim=True)
    a_BP = energy_BP / r_B1.clamp_min(1e-12)
    k = a_BP.shape[1] // 3
    threshold_B1 = a_BP.sort(dim=1).values[:, :k].amax(1, keepdim=True)
    return (r_B1 / 2 - a_BP) * (a_BP - threshold_B1).sign() + r_B1 / 2


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def near_tie(y: Tensor) -> bool:
    """Whether rounding could move a pixel across the target's threshold."""
    a_BP = ops.attention_map(y.double(), impl="torch").sort(dim=1).values
    k = a_BP.shape[1] // 3
    gaps = (a_BP - a_BP[:, k - 1 : k]).abs()
    return bool(((gaps > 0) & (gaps < 1e-6)).any())
