"""Drawn calls of ``fused_bn_act``, and the budget that a fast implementation's errors have.

Against float64, it may not err more than PyTorch in the same dtype does, plus a rounding. Gradients are
compared under each side's own ReLU mask, since a value that is zero but for rounding may fall on either
side; the masks themselves may differ only there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastokd.ops import fused_bn_act
from tests.ops.poison import poisoned

LEAVES = ("x", "weight", "bias", "residual")


@dataclass
class Case:
    """The arguments of one call and the gradient that comes back."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None
    grad_y: Tensor
    relu: bool

    def to(self, dtype: torch.dtype) -> Case:
        """The same values, maps and vectors alike, in another dtype."""
        residual = None if self.residual is None else self.residual.to(dtype)
        vectors = (self.weight.to(dtype), self.bias.to(dtype))
        return Case(self.x.to(dtype), *vectors, residual, self.grad_y.to(dtype), self.relu)


def channels_last(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.contiguous(memory_format=torch.channels_last)


def draw(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    residual: bool = True,
    relu: bool = True,
    mean: float = 0.5,
    device: torch.device | str = "cpu",
) -> Case:
    g = torch.Generator().manual_seed(sum(shape))

    def values() -> Tensor:
        return channels_last(torch.randn(shape, generator=g).to(dtype)).to(device)

    C = shape[1]
    x = values()
    shift = mean * torch.randn(1, C, 1, 1, generator=g).to(device)
    x = channels_last((x.float() + shift).to(dtype))
    weight, bias = (torch.randn(C, generator=g).to(device) for _ in range(2))
    return Case(x, weight, bias, values() if residual else None, values(), relu)


def run(
    case: Case, impl: str, ask: tuple[str, ...] = LEAVES, batches: int = 1
) -> dict[str, Tensor | None]:
    """y, the gradients asked for and the state afterwards."""
    C = case.x.shape[1]
    leaves: dict[str, Tensor | None] = {}
    for name in LEAVES:
        tensor = getattr(case, name)
        leaves[name] = None if tensor is None else tensor.detach().requires_grad_(name in ask)
    state = case.weight.new_zeros(C), case.weight.new_ones(C), case.weight.new_tensor(3).long()
    x, weight, bias, residual = leaves.values()
    assert x is not None
    for _ in range(batches):
        y = fused_bn_act(x, weight, bias, *state, residual_BCHW=residual, relu=case.relu, impl=impl)
    out: dict[str, Tensor | None] = {"y": y.detach()}
    if y.requires_grad:
        y.backward(case.grad_y)
    for name, leaf in leaves.items():
        out[f"grad_{name}"] = None if leaf is None else leaf.grad
    out["running_mean"], out["running_var"], out["num_batches_tracked"] = state
    return out


def exact(case: Case, y: Tensor) -> dict[str, Tensor | None]:
    """Float64's answer, its gradients under the ReLU mask of ``y``."""
    wide = case.to(torch.float64)
    answer = run(wide, "torch")
    if case.relu:
        wide.relu = False
        wide.grad_y = wide.grad_y * ~(y <= 0)
        answer |= {k: v for k, v in run(wide, "torch").items() if k.startswith("grad")}
    return answer


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def terms(case: Case) -> dict[str, Tensor]:
    """How large the terms are whose sum an output is, where they may cancel."""
    x, grad_y = case.x.double(), case.grad_y.double()
    over = {"dim": (0, 2, 3), "keepdim": True}
    mean = x.mean(**over)  # type: ignore[arg-type]
    std = (x.var(correction=0, **over) + 1e-5).sqrt()  # type: ignore[arg-type]
    scale = case.weight.double()[:, None, None].abs() / std
    normalised = (x - mean) / std
    k = (grad_y * normalised).mean(**over).abs() / std  # type: ignore[arg-type]
    return {
        "y": scale * (mean.abs() + std),
        "running_mean": 0.1 * 4 * (mean.abs() + std).flatten(),  # hundreds of merges in fp32
        "running_var": 0.1 * 4 * std.square().flatten(),  # likewise
        "grad_x": scale * (grad_y.abs().amax(**over) + k * mean.abs()),  # type: ignore[arg-type]
        "grad_weight": (grad_y * normalised).square().sum((0, 2, 3)).sqrt(),
        "grad_bias": grad_y.square().sum((0, 2, 3)).sqrt(),
    }


def check_budget(case: Case, impl: str) -> None:
    """Every value of ``impl``, and their RMS, are within the budget."""
    fast = run(case, impl)
    assert fast["y"] is not None
    with poisoned(False):
        plain = run(case, "torch")
        assert plain["y"] is not None
        fast_exact, plain_exact = exact(case, fast["y"]), exact(case, plain["y"])
        added = terms(case)
    for name, value in fast.items():
        theirs = plain[name]
        if theirs is None:
            assert value is None, name
            continue
        assert value is not None, name
        assert value.dtype == theirs.dtype, name
        assert value.shape == theirs.shape, name
        assert value.isfinite().all(), name
        want, theirs_want = fast_exact[name], plain_exact[name]
        assert want is not None
        assert theirs_want is not None
        error, theirs_error = value.double() - want, theirs.double() - theirs_want
        # A rounding of the result and one of its terms: sums are not taken in PyTorch's order.
        ulp = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
        slack = ulp * want.abs()
        if name in added:
            slack = slack + torch.finfo(torch.float32).eps * added[name]
        assert (error.abs() <= theirs_error.abs().max() + 4 * slack).all(), name
        assert rms(error) <= 1.05 * rms(theirs_error) + 2 * rms(slack), name
    if case.relu and fast_exact["y"] is not None:
        differ = (fast["y"] > 0) != (fast_exact["y"] > 0)
        near = torch.finfo(case.x.dtype).eps * max(1.0, case.x.abs().max().item())
        assert fast_exact["y"][differ].abs().max().item() < near if differ.any() else True


def half(case: Case, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Maps in ``dtype``, vectors in fp32, as under autocast."""
    residual = None if case.residual is None else case.residual.to(dtype)
    x, grad_y = case.x.to(dtype), case.grad_y.to(dtype)
    return Case(x, case.weight, case.bias, residual, grad_y, case.relu)
