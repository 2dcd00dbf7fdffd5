"""Max pooling after a ResNet's stem in C++ against torch's, in bf16 channels-last.

    python -m bench.bench_max_pool [--rounds N] [--threads N] [--cpu-time] [--json FILE]

Rows are forward and backward at 112x112 with 64 channels, 16 images, of stride 2; both run in turn,
after a check that they agree. The Triton form is timed on a GPU with the other ops:

    python bench/gpu_first.py --only op_times --out DIR
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from bench.turns import Clock, Row, in_turn, main, summary
from fastokd.learner.allocator import keep_freed_memory
from fastokd.ops.max_pool import max_pool

SHAPE = (16, 64, 112, 112)


def rows_of(rounds: int, clock: Clock) -> list[Row]:
    keep_freed_memory()  # as a run does
    x = torch.randn(SHAPE).bfloat16().contiguous(memory_format=torch.channels_last)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = F.max_pool2d(leaves[0], 3, 2, 1), max_pool(leaves[1], 2, impl="cpp")
    assert torch.equal(*outputs)
    y_grad = torch.randn_like(outputs[0])
    grads = [
        torch.autograd.grad(y, leaf, y_grad, retain_graph=True)[0]
        for y, leaf in zip(outputs, leaves, strict=True)
    ]
    torch.testing.assert_close(*grads, rtol=2**-6, atol=2**-6)
    forward = {
        "eager": lambda: F.max_pool2d(leaves[0], 3, 2, 1),
        "cpp": lambda: max_pool(leaves[1], 2, impl="cpp"),
    }
    backward = {
        name: lambda y=y, leaf=leaf: torch.autograd.grad(y, leaf, y_grad, retain_graph=True)
        for name, y, leaf in zip(("eager", "cpp"), outputs, leaves, strict=True)
    }
    return [
        summary("forward", in_turn(forward, rounds, clock)),
        summary("backward", in_turn(backward, rounds, clock)),
    ]


if __name__ == "__main__":
    main(__doc__ or "", rows_of)
