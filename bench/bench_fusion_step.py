"""The fusion step in C++ against concat, depthwise convolution, BatchNorm and ReLU in PyTorch.

    python -m bench.bench_fusion_step [--rounds N] [--threads N] [--cpu-time] [--json FILE]

Last maps of ResNet-32 at batch 128 in channels-last: two students' (FFSD's fusion, whose maps carry
no gradient) and the leader's (its transfusion, whose map does). Forward and backward, both programs
in turn, after they have been found equal. ``bound`` is the time that the bytes alone would take at
the speed of a copy in the same run: forward reads the maps, writes z, reads it and writes y; backward
reads z and dy twice and the maps once, and writes the maps' gradient where there is one.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn

from bench.turns import Clock, Row, in_turn, main, summary
from fastokd.ops import fusion_step


def step_row(m: int, dtype: torch.dtype, rounds: int, clock: Clock) -> Row:
    B, C, H, W = 128, 64, 8, 8
    K = m * C
    g = torch.Generator().manual_seed(0)

    def draw(channels: int) -> Tensor:
        x = torch.randn(B, channels, H, W, generator=g).to(dtype)
        return x.contiguous(memory_format=torch.channels_last)

    maps = [draw(C).requires_grad_(m == 1) for _ in range(m)]
    dy = draw(K)
    conv = nn.Conv2d(K, K, 3, padding=1, groups=K, bias=False)
    conv = conv.to(memory_format=torch.channels_last)
    weight = conv.weight.detach().to(dtype).requires_grad_()
    bn = nn.BatchNorm2d(K)
    leaves = [weight, bn.weight, bn.bias, *(maps if m == 1 else [])]

    def step(cpp: bool) -> tuple[Tensor, ...]:
        if cpp:
            y = fusion_step(maps, weight, bn, impl="cpp")
        else:
            x = maps[0] if m == 1 else torch.cat(maps, dim=1)
            y = torch.relu(bn(nn.functional.conv2d(x, weight, padding=1, groups=K)))
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    for mine, other in zip(step(True), step(False), strict=True):
        off = (mine.float() - other.float()).abs() > 0.03 * (other.float().abs().max())
        assert off.float().mean() < 0.01, f"{off.float().mean():.1%} of the values differ"
    target = torch.empty_like(dy)
    times = in_turn(
        {
            "eager": lambda: step(False),
            "cpp": lambda: step(True),
            "copy": lambda: target.copy_(dy),
        },
        rounds,
        clock,
    )
    what = "fusion of 2 maps" if m == 2 else "transfusion of 1 map"
    row = summary(f"{what}, {str(dtype)[6:]}, {C}x{H}x{W} B {B}", times)
    passes = 9 if m == 2 else 10
    row["bound_ms"] = statistics.median(times["copy"]) * passes / 2
    row["bytes"] = passes * dy.nbytes
    del row["copy_ms"]
    return row


def rows_of(rounds: int, clock: Clock) -> list[Row]:
    dtypes = (torch.float32, torch.bfloat16)
    return [step_row(m, dtype, rounds, clock) for m in (2, 1) for dtype in dtypes]


if __name__ == "__main__":
    main(__doc__ or "", rows_of)
