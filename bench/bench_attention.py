"""FFSD's map losses in C++ against their eager form in reference/, forward and backward.

    python -m bench.bench_attention [--rounds N] [--threads N] [--cpu-time] [--json FILE]

fp32 channels-last maps of ResNet-32's three stages at batch 128. Both programs run in turn on the
same maps, after a check that they agree; a ratio is the median of the rounds' ratios. A round makes
ten calls of each in a row (``over and over``) or one (``in turn``). The last row is every map loss of
one FFSD step with two students and a leader, without decoders and fusion. ``bound`` is the time for the
bytes alone at the speed of a copy in the same run: forward reads both maps, backward reads what it
differentiates and writes the gradient.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from bench.turns import Clock, Row, in_turn, main, summary
from fastokd import ops
from fastokd.reference import ffsd as eager

STAGES = [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
BATCH = 128
# Maps read or written, forward and backward together.
LOSSES: list[tuple[str, Callable[..., Tensor], Callable[..., Tensor], int]] = [
    ("attention_transfer", eager.attention_transfer, ops.attention_transfer, 4),
    ("feature_transfer", eager.feature_transfer, ops.feature_transfer, 5),
    ("attention_diversity", eager.attention_diversity, ops.attention_diversity, 4),
]
Maps = tuple[Tensor, ...]


def draw(seed: int) -> Maps:
    """A network's stage maps, past their ReLU."""
    g = torch.Generator().manual_seed(seed)
    maps = (torch.randn(BATCH, *shape, generator=g).relu() for shape in STAGES)
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in maps)


def row(
    what: str,
    step: Callable[[bool], tuple[Tensor, ...]],
    nbytes: int,
    rounds: int,
    clock: Clock,
    calls: int = 1,
) -> Row:
    """``step(fast)`` gives the loss and the gradients; so many calls in a row."""
    for mine, other in zip(step(True), step(False), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    source = torch.ones(1 << 22)
    target = torch.empty_like(source)
    times = in_turn(
        {
            "eager": lambda: step(False),
            "cpp": lambda: step(True),
            "copy": lambda: target.copy_(source),
        },
        rounds,
        clock,
        calls,
    )
    found = summary(f"{what}, {'over and over' if calls > 1 else 'in turn'}", times)
    found["bound_ms"] = statistics.median(times["copy"]) * nbytes / (2 * source.nbytes)
    found["bytes"] = nbytes
    del found["copy_ms"]
    return found


def loss_row(name: str, stage: int, calls: int, rounds: int, clock: Clock) -> Row:
    """One loss on one stage's maps, differentiated in the first."""
    _, slow, fast, passes = next(entry for entry in LOSSES if entry[0] == name)
    x, y = draw(0)[stage].requires_grad_(), draw(1)[stage]

    def step(cpp: bool) -> tuple[Tensor, ...]:
        loss = fast(x, y, impl="cpp") if cpp else slow(x, y)
        return loss.detach(), *torch.autograd.grad(loss, x)

    shape = "x".join(map(str, STAGES[stage]))
    return row(f"{name} {shape}", step, passes * x.nbytes, rounds, clock, calls)


def step_row(rounds: int, clock: Clock) -> Row:
    """Student 1 and the leader learn from maps; their decoders' maps are drawn, not decoded."""
    student, leader = ([x.requires_grad_() for x in draw(seed)] for seed in (0, 1))
    other, fused = draw(2)[-1], draw(3)[-1]
    taught, learning = (draw(seed)[:-1] for seed in (4, 5))
    learning = tuple(x.requires_grad_() for x in learning)
    leaves = [*student, *leader, *learning]

    def step(cpp: bool) -> tuple[Tensor, ...]:
        attention, feature, diversity = (
            (lambda x, y, f=f: f(x, y, impl="cpp")) if cpp else slow for _, slow, f, _ in LOSSES
        )
        shifted = ops.shifted_map(other, impl="cpp") if cpp else eager.shifted_map(other)
        loss = diversity(student[-1], other) + attention(leader[-1], fused)
        loss = loss + 0.0 * shifted[0, 0, 0, 0]
        for network in (student, leader):
            for x, y, z in zip(network, taught, learning, strict=False):
                loss = loss + attention(x, y)
                loss = loss + feature(z, x.detach()) + attention(z, x.detach())
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    early, last = sum(x.nbytes for x in student[:-1]), student[-1].nbytes
    nbytes = 2 * (4 + 5 + 4) * early + (4 + 4 + 2) * last
    return row("every map loss of an FFSD step", step, nbytes, rounds, clock)


def rows_of(rounds: int, clock: Clock) -> list[Row]:
    losses = [(name, stage) for name, *_ in LOSSES[:2] for stage in range(3)]
    losses.append(("attention_diversity", 2))
    rows = [loss_row(*loss, calls, rounds, clock) for loss in losses for calls in (10, 1)]
    rows.append(step_row(rounds, clock))
    return rows


if __name__ == "__main__":
    main(__doc__ or "", rows_of)
