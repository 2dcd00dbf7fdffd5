"""DKD and DIST in C++ against plain torch, forward and backward.

    python -m bench.bench_targets [--rounds N] [--threads N] [--cpu-time] [--json FILE]

S students and the teacher of all of them, T = 4, fp32 on both sides, from logits to the gradient of the
students'. ``eager`` is the reference of the op, which takes all students at once. Both run in turn in one
process, after a check that they agree; a ratio is the median of the rounds' ratios. A round makes ten
calls of each in a row (``over and over``) or one, with the caches that the other leaves (``in turn``).
``bound`` is the time to copy the students' logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.turns import Clock, Row, in_turn, main, summary
from fastokd.ops.correlation_distillation import correlation_losses
from fastokd.ops.decoupled_distillation import decoupled_losses

B = 128
Losses = Callable[[Tensor, Tensor, Tensor, str], Tensor]
OPS: dict[str, Losses] = {
    "DKD": lambda z, t, labels_B, impl: decoupled_losses(z, t, labels_B, impl=impl),
    "DIST": lambda z, t, labels_B, impl: correlation_losses(z, t, temperature=4.0, impl=impl),
}


def op_row(op: str, S: int, C: int, calls: int, rounds: int, clock: Clock) -> Row:
    g = torch.Generator().manual_seed(0)
    logits_SBC = (3 * torch.randn(S, B, C, generator=g)).requires_grad_()
    target_SBC = 3 * torch.randn(1, B, C, generator=g)
    labels_B = torch.randint(C, (B,), generator=g)

    def step(impl: str) -> tuple[Tensor, Tensor]:
        loss = OPS[op](logits_SBC, target_SBC, labels_B, impl).sum()
        return loss.detach(), torch.autograd.grad(loss, logits_SBC)[0]

    for x, y in zip(step("cpp"), step("torch"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))
    to = torch.empty_like(logits_SBC)
    programs = {
        "eager": lambda: step("torch"),
        "cpp": lambda: step("cpp"),
        "copy": lambda: to.copy_(logits_SBC.detach()),
    }
    times = in_turn(programs, rounds, clock, calls)
    way = "over and over" if calls > 1 else "in turn"
    found = summary(f"{op} S {S} C {C}, {way}", times)
    found["bound_ms"] = found.pop("copy_ms")
    return found


def rows_of(rounds: int, clock: Clock) -> list[Row]:
    return [
        op_row(op, S, C, calls, rounds, clock)
        for op in OPS
        for S in (1, 4)
        for C in (100, 1000)
        for calls in (10, 1)
    ]


if __name__ == "__main__":
    main(__doc__ or "", rows_of)
