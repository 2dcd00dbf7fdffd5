"""Each Triton op, forward and backward, compared with its PyTorch form.

A graph replays one call for each of several sets of inputs; they exceed L2, so each call reads its inputs
from memory. GB/s count the required bytes: the inputs once and the gradients once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.gpu.child import Result
from bench.gpu.machine import call_ms, the_device
from fastokd import ops
from fastokd.models.layers import NormAct
from fastokd.ops.correlation_distillation import correlation_losses
from fastokd.ops.decoupled_distillation import decoupled_losses
from fastokd.ops.max_pool import max_pool

ROTATED_BYTES, MOST_SETS = 160 << 20, 64
S = 4
# B, C, pixels a side, residual: ResNet-32's first and last stages, ResNet-18's first.
NORMS = ((128, 16, 32, False), (128, 16, 32, True), (128, 64, 8, True), (256, 64, 56, True))
# B, C, pixels a side, stride: after the stem of a ResNet at 224 pixels, in GoogLeNet's first module.
POOLS = ((256, 64, 112, 2), (128, 192, 32, 1))
Call = Callable[[str, list[Tensor]], Tensor]


@dataclass(frozen=True)
class Case:
    """An op at one shape: ``inputs`` draws a set of inputs; ``call`` returns the value to differentiate
    (with ``gradients=False`` only the output)."""

    name: str
    inputs: Callable[[], list[Tensor]]
    call: Call
    gradients: bool = True


def measure(result: Result) -> None:
    """The section: a row for each op."""
    device = the_device(result)
    for case in cases(device, 64 if result.dry else 1):
        row = result.row(name=case.name)
        try:
            for impl in ("torch",) if result.dry else ("triton", "torch"):
                us, moved = _timed(case, impl, device)
                row["torch_us" if impl == "torch" else "us"] = us
                if impl == "triton":
                    row["ms"] = us / 1e3
                    row["gb_per_second"] = moved / us / 1e3
                row["bytes"] = moved
            row["torch_ms"] = row["torch_us"] / 1e3
        except Exception as error:
            result.fail(row, error)
        result.write()
    ratios = [
        row["torch_us"] / row["us"]
        for row in result.data["rows"]
        if "us" in row and "torch_us" in row
    ]
    if ratios:
        result.figure("median of torch over triton", statistics.median(ratios))


def cases(device: torch.device, shrink: int = 1) -> list[Case]:
    """The ops at the shapes of the papers' steps, in bf16 and channels-last."""
    found = []
    for batch, C, d in ((256, 1000, 64), (128, 100, 8)):
        found += _losses(device, max(2, batch // shrink), C, d)
    for C, side in ((16, 32), (32, 16), (64, 8)):
        found += _map_losses(device, max(2, 128 // shrink), C, side)
    found.append(_fusion(device, max(2, 128 // shrink), 64, 8))
    for batch, C, side, residual in NORMS:
        found.append(_norm(device, max(2, batch // shrink), C, side, residual))
    for batch, C, side, stride in POOLS:
        found.append(_pool(device, max(2, batch // shrink), C, side, stride))
    return found


def _draw(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _losses(device: torch.device, B: int, C: int, d: int) -> list[Case]:
    labels_B = torch.randint(C, (B,), device=device)
    scores_SS = torch.zeros(S, S, device=device).fill_diagonal_(-torch.inf)
    return [
        Case(
            f"mixture_distillation S {S} B {B} C {C}",
            lambda: [_draw(device, S, B, C)],
            lambda impl, x: ops.mixture_distillation(x[0], labels_B, scores_SS, impl=impl).total,
        ),
        Case(
            f"peer_attention_distillation S {S} B {B} C {C}",
            lambda: [_draw(device, S, B, C), *(_draw(device, B, S - 1, d) for _ in range(2))],
            lambda impl, x: (
                ops.peer_attention_distillation(x[0], labels_B, x[1], x[2], impl=impl).total
            ),
        ),
        *_from_a_target(device, labels_B, B, C),
    ]


def _from_a_target(device: torch.device, labels_B: Tensor, B: int, C: int) -> list[Case]:
    """DKD and DIST of S students from one target."""

    def inputs() -> list[Tensor]:
        return [_draw(device, S, B, C), _draw(device, 1, B, C)]

    return [
        Case(
            f"decoupled_distillation S {S} B {B} C {C}",
            inputs,
            lambda impl, x: decoupled_losses(x[0], x[1], labels_B, impl=impl),
        ),
        Case(
            f"correlation_distillation S {S} B {B} C {C}",
            inputs,
            lambda impl, x: correlation_losses(x[0], x[1], impl=impl),
        ),
    ]


def _map_losses(device: torch.device, B: int, C: int, side: int) -> list[Case]:
    def maps() -> list[Tensor]:
        pair = [_draw(device, B, C, side, side).relu() for _ in range(2)]
        return [x.contiguous(memory_format=torch.channels_last) for x in pair]

    def loss(name: str) -> Call:
        return lambda impl, x: getattr(ops, name)(x[0], x[1].detach(), impl=impl)

    shape = f"B {B} {C}x{side}x{side}"
    names = ("attention_transfer", "feature_transfer", "attention_diversity")
    found = [Case(f"{name} {shape}", maps, loss(name)) for name in names]
    shifted: Call = lambda impl, x: ops.shifted_map(x[0], impl=impl)  # noqa: E731
    found.append(Case(f"shifted_map {shape}", lambda: maps()[:1], shifted, gradients=False))
    return found


def _fusion(device: torch.device, B: int, C: int, side: int) -> Case:
    bn = nn.BatchNorm2d(2 * C).to(device)

    def inputs() -> list[Tensor]:
        maps = [_draw(device, B, C, side, side).relu() for _ in range(2)]
        maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
        return [*maps, _draw(device, 2 * C, 1, 3, 3)]

    def call(impl: str, x: list[Tensor]) -> Tensor:
        return ops.fusion_step([x[0].detach(), x[1].detach()], x[2], bn, impl=impl)

    return Case(f"fusion_step B {B} 2 maps {C}x{side}x{side}", inputs, call)


def _norm(device: torch.device, B: int, C: int, side: int, residual: bool) -> Case:
    layer = NormAct(C).to(device)

    def inputs() -> list[Tensor]:
        maps = [_draw(device, B, C, side, side) for _ in range(2 if residual else 1)]
        return [x.contiguous(memory_format=torch.channels_last) for x in maps]

    def call(impl: str, x: list[Tensor]) -> Tensor:
        return ops.norm_act(layer, x[0], x[1] if residual else None, impl=impl)

    name = f"fused_bn_act B {B} {C}x{side}x{side}{' + residual' if residual else ''}"
    return Case(name, inputs, call)


def _pool(device: torch.device, B: int, C: int, side: int, stride: int) -> Case:
    return Case(
        f"max_pool B {B} {C}x{side}x{side}, stride {stride}",
        lambda: [_draw(device, B, C, side, side).contiguous(memory_format=torch.channels_last)],
        lambda impl, x: max_pool(x[0], stride, impl=impl),
    )


def _timed(case: Case, impl: str, device: torch.device) -> tuple[float, int]:
    """Microseconds of one call, and the bytes that it must move."""
    first = case.inputs()
    size = sum(x.nbytes for x in first)
    count = 2 if device.type == "cpu" else min(MOST_SETS, 1 + ROTATED_BYTES // size)
    sets = [first, *(case.inputs() for _ in range(count - 1))]
    moved = [0]

    def once(inputs: list[Tensor]) -> None:
        if not case.gradients:
            out = case.call(impl, inputs)
            moved[0] = size + out.nbytes
            return
        leaves = [x.requires_grad_() for x in inputs]
        out = case.call(impl, leaves)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
        written = [grad.nbytes for grad in grads if grad is not None]
        moved[0] = size + sum(written) + (out.nbytes if out.dim() else 0)

    def every() -> None:
        for inputs in sets:
            once(inputs)

    if device.type == "cpu":
        every()
        return 1e3 * statistics.median(call_ms(every, 3, device)) / count, moved[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            once(first)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        every()
    call_ms(graph.replay, 3, device)
    return 1e3 * statistics.median(call_ms(graph.replay, 20, device)) / count, moved[0]
