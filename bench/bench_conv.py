"""Convolutions in C++ against torch's, in bf16 channels-last on a CPU with AVX-512 BF16.

    python -m bench.bench_conv [--rounds N] [--threads N] [--cpu-time] [--json FILE]

A row is one part of one layer of a CIFAR ResNet at batch 128, or of ResNet-18 at batch 16: forward,
the gradient of the input or of the weight, where we have a kernel. Both run in turn, after a check that
they agree. ``bound`` is the time for the FLOPs alone at the speed of a 2048^3 GEMM in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from bench.turns import Clock, Row, in_turn, main, summary
from fastokd.learner.allocator import keep_freed_memory

# Inputs, outputs, side, stride, batch.
LAYERS = [
    (16, 16, 32, 1, 128),
    (32, 32, 16, 1, 128),
    (64, 64, 8, 1, 128),
    (16, 32, 32, 2, 128),
    (32, 64, 16, 2, 128),
    (64, 64, 56, 1, 16),
    (128, 128, 28, 1, 16),
    (256, 256, 14, 1, 16),
    (512, 512, 7, 1, 16),
    (256, 512, 14, 2, 16),
]
NARROW = 64  # inputs: the wider ones' forward and input gradient are torch's


def rows_of(rounds: int, clock: Clock) -> list[Row]:
    keep_freed_memory()  # as a run does
    square = torch.randn(2048, 2048).bfloat16()
    products = statistics.median(in_turn({"mm": lambda: square @ square}, 5, clock)["mm"])
    return [
        _row(layer, part, products / 2048**3, rounds, clock)
        for layer in LAYERS
        for part in (("forward", "input", "weight") if layer[0] <= NARROW else ("weight",))
    ]


def _row(
    layer: tuple[int, int, int, int, int], part: str, ms_a_product: float, rounds: int, clock: Clock
) -> Row:
    C, outputs, side, stride, batch = layer
    x = torch.randn(batch, C, side, side).bfloat16().to(memory_format=torch.channels_last)
    w = torch.randn(outputs, C, 3, 3).div(C**0.5 * 3).to(memory_format=torch.channels_last)
    narrow = w.bfloat16()
    y = torch.conv2d(x, narrow, None, stride, 1)
    y_grad = torch.randn_like(y)
    products = y.numel() * C * 9

    def torchs(*mask: bool) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            y_grad, x, narrow, None, (stride, stride), (1, 1), (1, 1), False, (0, 0), 1, mask
        )
        return found

    leaf = x.clone().requires_grad_()
    ours_y = torch.ops.fastokd.conv2d(leaf, narrow, stride, 1)
    eager, cpp = _pair(
        part,
        {
            "forward": (
                lambda: torch.conv2d(x, narrow, None, stride, 1),
                lambda: torch.ops.fastokd.conv2d(x, narrow, stride, 1),
            ),
            "input": (
                lambda: torchs(True, False, False)[0],
                lambda: torch.autograd.grad(ours_y, leaf, y_grad, retain_graph=True)[0],
            ),
            "weight": (
                lambda: torchs(False, True, False)[1],
                lambda: torch.ops.fastokd.conv_weight_grad(y_grad, x, 3, stride, 1),
            ),
        },
    )
    found = summary(
        f"{part} {C} to {outputs}, {side}x{side}, stride {stride}",
        in_turn({"eager": eager, "cpp": cpp}, rounds, clock),
    )
    found["bound_ms"] = ms_a_product * products
    return found


Call = Callable[[], Tensor]


def _pair(part: str, calls: dict[str, tuple[Call, Call]]) -> tuple[Call, Call]:
    eager, cpp = calls[part]
    scale = float(eager().float().abs().max())
    torch.testing.assert_close(cpp().float(), eager().float(), rtol=2**-6, atol=2**-8 * scale)
    return eager, cpp


if __name__ == "__main__":
    main(__doc__ or "", rows_of)
