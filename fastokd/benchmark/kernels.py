"""Each fused loss of this device against PyTorch's form of it: equal first, then timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastokd import ops
from fastokd.benchmark.peak import synchronize
from fastokd.errors import UserError

S, B, C, CHANNELS, SIDE = 4, 256, 1000, 64, 32
# How much further from float64 than PyTorch's float32 an op may be, and besides.
SLACK, TINY = 1.5, 1e-5

# Takes an implementation and inputs; gives the loss.
Loss = Callable[[str, list[Tensor]], Tensor]


def _cases(scale: float) -> dict[str, tuple[Loss, list[Tensor]]]:
    """The ops by name, and their inputs on the CPU; ``scale`` shrinks the batch."""
    batch = max(2, int(B * scale))
    g = torch.Generator().manual_seed(0)
    logits_SBC = 3 * torch.randn(S, batch, C, generator=g)
    labels_B = torch.randint(C, (batch,), generator=g)
    scores_SS = torch.zeros(S, S).fill_diagonal_(-torch.inf)
    query, key = (0.3 * torch.randn(batch, S - 1, 32, generator=g) for _ in range(2))
    maps = [torch.randn(batch, CHANNELS, SIDE, SIDE, generator=g).relu() for _ in range(2)]

    def mixture(impl: str, x: list[Tensor]) -> Tensor:
        scores = scores_SS.to(x[0])
        return ops.mixture_distillation(x[0], labels_B.to(x[0].device), scores, impl=impl).total

    def attention_loss(impl: str, x: list[Tensor]) -> Tensor:
        labels = labels_B.to(x[0].device)
        return ops.peer_attention_distillation(x[0], labels, x[1], x[2], impl=impl).total

    def of_maps(name: str) -> Loss:
        return lambda impl, x: getattr(ops, name)(x[0], x[1].detach(), impl=impl)

    return {
        "mixture_distillation": (mixture, [logits_SBC]),
        "peer_attention_distillation": (attention_loss, [logits_SBC, query, key]),
        **{
            name: (of_maps(name), maps)
            for name in ("attention_transfer", "feature_transfer", "attention_diversity")
        },
    }


def measure_kernels(
    device: torch.device, rounds: int = 30, scale: float = 1.0
) -> list[dict[str, Any]]:
    """A row for each op, forward and backward in float32: milliseconds of the device's own form
    and of PyTorch's, the rounds' ratio, and both errors against float64."""
    fast = "triton" if device.type == "cuda" else "cpp"
    return [
        _row(name, loss, [x.to(device) for x in inputs], device, fast, rounds)
        for name, (loss, inputs) in _cases(scale).items()
    ]


def _row(
    name: str, loss: Loss, inputs: list[Tensor], device: torch.device, fast: str, rounds: int
) -> dict[str, Any]:
    def run(impl: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        total = loss(impl, leaves)
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        return [total.detach(), *(grad for grad in grads if grad is not None)]

    try:
        ours = run(fast)
    except UserError as error:
        return {"op": name, "impl": fast, "refused": str(error)}
    exact, plain = run("torch", torch.float64), run("torch")
    errors = [_error(found, exact) for found in (ours, plain)]
    row: dict[str, Any] = {
        "op": name,
        "impl": fast,
        "shapes": [list(x.shape) for x in inputs],
        "error": errors[0],
        "plain_error": errors[1],
        "equal": errors[0] <= SLACK * errors[1] + TINY,
    }
    if not row["equal"]:
        return row
    times: dict[str, list[float]] = {fast: [], "torch": []}
    for _ in range(rounds):
        for impl, taken in times.items():
            synchronize(device)
            start = time.perf_counter()
            run(impl)
            synchronize(device)
            taken.append(1e3 * (time.perf_counter() - start))
    ratios = [plain / own for own, plain in zip(times[fast], times["torch"], strict=True)]
    return row | {
        "ms": statistics.median(times[fast]),
        "torch_ms": statistics.median(times["torch"]),
        "ratio": statistics.median(ratios),
    }


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error, in the norm, of the loss and of each gradient."""
    return max(
        ((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True)
    )
