"""OKDDip's loss head in C++ against the eager head of reference/, forward and backward.

    python -m bench.bench_mixture_distillation [--rounds N] [--threads N] [--cpu-time] [--json FILE]

Three peers and a leader, T = 3, fp32 on both sides, from logits, queries and keys to the gradients of
all three: both include the attention's product, neither the projections. Both run in turn in one
process, after a check that they agree; a ratio is the median of the rounds' ratios. A round makes ten
calls of each in a row (``over and over``) or one, with the caches that the other leaves (``in turn``).
The rows ``separate`` also stack four tensors of logits and split the gradient, as a cohort of separate
networks does. ``bound`` is the time for the bytes at the speed of a copy (every logit read once, every
gradient written once); ``exp_ms`` (in the JSON) is the time for two exponentials a logit, the student's
and its target's, at the speed of torch.exp (at T = 3 e^z is the cube of e^(z / T)).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.turns import Clock, Row, in_turn, main, summary
from fastokd.ops import peer_attention_distillation
from fastokd.reference.okddip import ReferenceTwoLevel

STUDENTS, PEERS, TEMPERATURE, KD_WEIGHT = 4, 3, 3.0, 0.8
Step = Callable[[], list[Tensor]]


def eager_head(logits: list[Tensor], query: Tensor, key: Tensor, labels_B: Tensor) -> Tensor:
    """The published loop's, with the attention from queries and keys as they are."""
    head = SimpleNamespace(
        peers=PEERS,
        temperature=TEMPERATURE,
        mix_probs=False,
        detach=False,
        has_leader=True,
        attention=lambda features: F.softmax(torch.bmm(query, key.mT), dim=2),
    )
    out = SimpleNamespace(logits=logits, features=logits)
    losses = ReferenceTwoLevel.losses(head, out, labels_B, KD_WEIGHT)  # type: ignore[arg-type]
    return losses.total


def head_row(B: int, C: int, separate: bool, calls: int, rounds: int, clock: Clock) -> Row:
    g = torch.Generator().manual_seed(0)
    logits_SBC = 3 * torch.randn(STUDENTS, B, C, generator=g)
    logits = [x.clone().requires_grad_() for x in logits_SBC]
    logits_SBC.requires_grad_()
    query, key = ((0.3 * torch.randn(B, PEERS, 32, generator=g)).requires_grad_() for _ in range(2))
    labels_B = torch.randint(C, (B,), generator=g)

    def cpp() -> list[Tensor]:
        leaves = logits if separate else [logits_SBC]
        loss = peer_attention_distillation(
            torch.stack(logits) if separate else logits_SBC,
            labels_B,
            query,
            key,
            kd_weight=KD_WEIGHT,
            temperature=TEMPERATURE,
            impl="cpp",
        )
        return [loss.total.detach(), *torch.autograd.grad(loss.total, [*leaves, query, key])]

    def eager() -> list[Tensor]:
        total = eager_head(logits, query, key, labels_B)
        return [total.detach(), *torch.autograd.grad(total, [*logits, query, key])]

    ours, theirs = cpp(), eager()
    if not separate:
        theirs[1:-2] = [torch.stack(theirs[1:-2])]
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))

    source = torch.ones(1 << 14)  # fits the L1 and L2 caches
    powers, target = torch.empty_like(source), torch.empty_like(logits_SBC)
    times = in_turn(
        {
            "eager": eager,
            "cpp": cpp,
            "copy": lambda: target.copy_(logits_SBC.detach()),
            "exp": lambda: torch.exp(source, out=powers),
        },
        rounds,
        clock,
        calls,
    )
    separately = ", separate" if separate else ""
    found = summary(
        f"B {B} C {C}{separately}, {'over and over' if calls > 1 else 'in turn'}", times
    )
    found["bound_ms"] = found.pop("copy_ms")
    found["exp_ms"] = statistics.median(times["exp"]) * 2 * logits_SBC.numel() / source.numel()
    found["eager_best_ms"], found["cpp_best_ms"] = min(times["eager"]), min(times["cpp"])
    return found


def rows_of(rounds: int, clock: Clock) -> list[Row]:
    return [
        head_row(B, C, separate, calls, rounds, clock)
        for separate in (False, True)
        for B, C in ((256, 1000), (128, 100), (128, 10))
        for calls in (10, 1)
    ]


if __name__ == "__main__":
    main(__doc__ or "", rows_of)
