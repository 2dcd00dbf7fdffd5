"""fused_bn_act against PyTorch's BatchNorm + add + ReLU: alone, and inside a ResNet-32 step.

    python bench/bench_fused_bn_act.py [--rounds N] [--threads N] [--cpu-time] [--json FILE]

Both run in turn on the same bf16 channels-last maps, forward and backward, after they have been
found equal; a ratio is the median of the rounds' ratios, its spread their quartiles. ``bound`` is
the time that the bytes alone would take at the speed of a copy of the same size in the same run:
forward reads x twice and writes y (and reads the residual), backward reads x and dy twice and
writes dx (with a residual: reads y once and writes its gradient, besides). On a machine with other
work ``--threads 1 --cpu-time`` counts the seconds on a core instead of the wall's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastokd.models import create_model
from fastokd.models.layers import NormAct
from fastokd.ops import _cpp, norm_act

# What the claim names, then the other stages of the CIFAR ResNets and one of ResNet-18's last.
SHAPES = [(64, 64, 56, 56), (128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8), (16, 512, 7, 7)]

Row = dict[str, str | float]


clock = time.perf_counter


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Each call's times in milliseconds, one of each a round, after three rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 3):
        for name, call in calls.items():
            start = clock()
            call()
            if i >= 3:
                times[name].append(1e3 * (clock() - start))
    return times


def summary(what: str, times: dict[str, list[float]]) -> Row:
    ratios = [a / b for a, b in zip(times["torch"], times["cpp"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return {
        "what": what,
        **{f"{name}_ms": statistics.median(values) for name, values in times.items()},
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
    }


def check_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Within bf16's rounding, but for the few values whose ReLU falls on the other side of zero."""
    for mine, other in zip(ours, theirs, strict=True):
        off = (mine.float() - other.float()).abs() > 0.03 * other.float().abs() + 0.03
        assert off.float().mean() < 0.01, f"{off.float().mean():.1%} of the values differ"


def layer_row(shape: tuple[int, int, int, int], residual: bool, rounds: int) -> Row:
    """One layer alone, forward and backward."""
    g = torch.Generator().manual_seed(0)

    def values() -> Tensor:
        x_BCHW = torch.randn(shape, generator=g).bfloat16()
        return x_BCHW.contiguous(memory_format=torch.channels_last)

    x, grad_y = values().requires_grad_(), values()
    add = values().requires_grad_() if residual else None
    layers = {"torch": NormAct(shape[1]), "cpp": NormAct(shape[1])}
    layers["cpp"].fused = lambda module, *maps: norm_act(module, *maps, impl="cpp")
    inputs = [x] if add is None else [x, add]

    def step(layer: NormAct) -> list[Tensor]:
        y = layer(x, add)
        grads = torch.autograd.grad(y, [*inputs, layer.weight, layer.bias], grad_y)
        return [y.detach(), *grads]

    check_equal(step(layers["cpp"])[: 1 + len(inputs)], step(layers["torch"])[: 1 + len(inputs)])
    target = torch.empty_like(grad_y)
    times = in_turn(
        {
            "torch": lambda: step(layers["torch"]),
            "cpp": lambda: step(layers["cpp"]),
            "copy": lambda: target.copy_(grad_y),
        },
        rounds,
    )
    B, C, H, W = shape
    row = summary(f"{C}x{H}x{W} B {B}{' + residual' if residual else ''}", times)
    passes = 11 if residual else 8  # maps read or written; a copy has 2
    row["bound_ms"] = statistics.median(times["copy"]) * passes / 2
    row["bytes"] = passes * x.nbytes
    del row["copy_ms"]
    return row


def step_row(rounds: int, batch_size: int = 128) -> Row:
    """A whole training step of ResNet-32 under bf16 autocast, SGD included."""
    model = create_model("resnet32", num_classes=100).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    images = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(100, (batch_size,))

    def loss(impl: str) -> Tensor:
        for module in model.modules():
            if isinstance(module, NormAct):
                module.fused = norm_act if impl == "cpp" else None
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        return F.cross_entropy(logits.float(), labels)

    def step(impl: str) -> None:
        loss(impl).backward()
        optimizer.step()
        optimizer.zero_grad()

    theirs, ours = loss("torch").item(), loss("cpp").item()
    assert abs(theirs - ours) < 0.02 * theirs, (theirs, ours)
    times = in_turn({"torch": lambda: step("torch"), "cpp": lambda: step("cpp")}, rounds)
    return summary(f"ResNet-32 step, B {batch_size}", times)


def table(rows: list[Row]) -> str:
    lines = [f"{'measured-cpu':32} torch ms   cpp ms  ratio (quartiles)   bound ms"]
    for row in rows:
        bound = f"{row['bound_ms']:9.3f}" if "bound_ms" in row else ""
        lines.append(
            f"{row['what']:32} {row['torch_ms']:8.3f} {row['cpp_ms']:8.3f}  {row['ratio']:5.2f} "
            f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f}) {bound}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.cpu_time:
        global clock
        clock = time.process_time
    reason = _cpp.ensure_built()
    if reason is not None:
        raise SystemExit(reason)
    rows = [layer_row(s, residual, args.rounds) for residual in (False, True) for s in SHAPES]
    rows.append(step_row(args.rounds))
    print(table(rows))
    print(
        f"torch {torch.__version__}, {args.threads} threads, {_cpp.capability()}"
        f", {'CPU' if args.cpu_time else 'wall'} time"
    )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
