"""fused_bn_act against PyTorch's BatchNorm + add + ReLU: alone, and inside a ResNet-32 step.

    python -m bench.bench_fused_bn_act [--rounds N] [--threads N] [--cpu-time] [--json FILE]

Both run in turn on the same bf16 channels-last maps, forward and backward, after a check that they
agree; a ratio is the median of the rounds' ratios, its spread their quartiles. ``bound`` is
the time for the bytes alone at the speed of a copy of the same size in the same run:
forward reads x twice and writes y (and reads the residual), backward reads x and dy twice and
writes dx (with a residual: reads y once and writes its gradient, besides). On a machine with other
work ``--threads 1 --cpu-time`` counts the seconds on a core instead of the wall's.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.turns import Clock, Row, in_turn, main, summary
from fastokd.models import create_model
from fastokd.models.layers import NormAct

# The claim's shape, then the other stages of the CIFAR ResNets and one of ResNet-18's last.
SHAPES = [(64, 64, 56, 56), (128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8), (16, 512, 7, 7)]


def check_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Within bf16's rounding, but for the few values whose ReLU falls on the other side of zero."""
    for mine, other in zip(ours, theirs, strict=True):
        off = (mine.float() - other.float()).abs() > 0.03 * other.float().abs() + 0.03
        assert off.float().mean() < 0.01, f"{off.float().mean():.1%} of the values differ"


def layer_row(shape: tuple[int, int, int, int], residual: bool, rounds: int, clock: Clock) -> Row:
    """One layer alone, forward and backward."""
    g = torch.Generator().manual_seed(0)

    def values() -> Tensor:
        x_BCHW = torch.randn(shape, generator=g).bfloat16()
        return x_BCHW.contiguous(memory_format=torch.channels_last)

    x, grad_y = values().requires_grad_(), values()
    add = values().requires_grad_() if residual else None
    layers = {"torch": NormAct(shape[1]), "cpp": NormAct(shape[1])}
    layers["cpp"].impl = "cpp"
    inputs = [x] if add is None else [x, add]

    def step(layer: NormAct) -> list[Tensor]:
        y = layer(x, add)
        grads = torch.autograd.grad(y, [*inputs, layer.weight, layer.bias], grad_y)
        return [y.detach(), *grads]

    check_equal(step(layers["cpp"])[: 1 + len(inputs)], step(layers["torch"])[: 1 + len(inputs)])
    target = torch.empty_like(grad_y)
    times = in_turn(
        {
            "eager": lambda: step(layers["torch"]),
            "cpp": lambda: step(layers["cpp"]),
            "copy": lambda: target.copy_(grad_y),
        },
        rounds,
        clock,
    )
    B, C, H, W = shape
    row = summary(f"{C}x{H}x{W} B {B}{' + residual' if residual else ''}", times)
    passes = 11 if residual else 8  # maps read or written; a copy has 2
    row["bound_ms"] = statistics.median(times["copy"]) * passes / 2
    row["bytes"] = passes * x.nbytes
    del row["copy_ms"]
    return row


def step_row(rounds: int, clock: Clock, batch_size: int = 128) -> Row:
    """A whole training step of ResNet-32 under bf16 autocast, SGD included."""
    model = create_model("resnet32", num_classes=100).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    images = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(100, (batch_size,))

    def loss(impl: str) -> Tensor:
        for module in model.modules():
            if isinstance(module, NormAct):
                module.impl = "auto" if impl == "cpp" else "torch"
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        return F.cross_entropy(logits.float(), labels)

    def step(impl: str) -> None:
        loss(impl).backward()
        optimizer.step()
        optimizer.zero_grad()

    theirs, ours = loss("torch").item(), loss("cpp").item()
    assert abs(theirs - ours) < 0.02 * theirs, (theirs, ours)
    times = in_turn({"eager": lambda: step("torch"), "cpp": lambda: step("cpp")}, rounds, clock)
    return summary(f"ResNet-32 step, B {batch_size}", times)


def rows_of(rounds: int, clock: Clock) -> list[Row]:
    rows = [layer_row(s, residual, rounds, clock) for residual in (False, True) for s in SHAPES]
    return [*rows, step_row(rounds, clock)]


if __name__ == "__main__":
    main(__doc__ or "", rows_of)
