"""The sections that time training steps: ours and the published loop's.

The published loop is timed in fp32, and in bf16 with channels-last; both with ``cudnn.benchmark``, as
its authors set it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.gpu.child import Result
from bench.gpu.machine import the_device
from bench.gpu.timing import FULL, LARGE, Program, measure
from fastokd import ops
from fastokd.benchmark.step import step_flops
from fastokd.recipe.names import Recipe, recipe

STUDENTS = 4


def small_recipe(sharing: str, dry: bool) -> Recipe:
    """OKDDip's ResNet-32 on CIFAR-100, batch 128."""
    model, batch = ("resnet8", 4) if dry else ("resnet32", 128)
    return recipe(f"okddip-{sharing}@{STUDENTS}/{model}/cifar100", batch_size=batch)


def large_recipe(sharing: str, model: str, dry: bool) -> Recipe:
    """OKDDip on ImageNet's shapes, batch 256."""
    if dry:
        name = f"okddip-{sharing}@2/resnet18/imagenet"
        # At the published rate two images diverge.
        return recipe(name, batch_size=2, image_size=32, lr=0.001)
    return recipe(f"okddip-{sharing}@{STUDENTS}/{model}/imagenet", batch_size=256)


def resnet32(result: Result) -> None:
    """Branch and network ResNet-32: all programs of one sharing in turn."""
    the_device(result)
    cohorts = [
        (f"{sharing} ResNet-32", small_recipe(sharing, result.dry))
        for sharing in ("branch", "network")
    ]
    for name, of in cohorts:
        measure(result, small_programs(name, of), FULL)
        figures(result, name)
    _flops(result, dict(cohorts))


def small_programs(name: str, of: Recipe) -> list[Program]:
    """Ours in five ways and the published loop in two."""
    by_hand = Program(f"{name} published bf16", of, "published", cudnn_benchmark=True)
    return [
        Program(f"{name} captured", of, capture=True),
        Program(f"{name} captured, streams", of, capture=True, streams=True),
        Program(f"{name} grouped captured", of, engine="grouped", capture=True),
        Program(f"{name} eager", of),
        by_hand,
        replace(by_hand, name=f"{name} published fp32", precision="fp32"),
        Program(f"{name} grouped eager", of, engine="grouped"),
    ]


def imagenet(result: Result) -> None:
    """Network ResNet-34 and branch ResNet-18, one program at a time."""
    the_device(result)
    cohorts = [
        ("network ResNet-34", large_recipe("network", "resnet34", result.dry)),
        ("branch ResNet-18", large_recipe("branch", "resnet18", result.dry)),
    ]
    first, more, last = [], [], []
    for name, of in cohorts:
        captured = Program(f"{name} captured, benchmark", of, capture=True, cudnn_benchmark=True)
        eager = Program(f"{name} eager, benchmark", of, cudnn_benchmark=True)
        by_hand = Program(f"{name} published bf16", of, "published", cudnn_benchmark=True)
        first += [captured, by_hand]
        more += [eager, replace(captured, name=f"{name} captured", cudnn_benchmark=False)]
        more += [replace(by_hand, name=f"{name} published fp32", precision="fp32")]
        last += [replace(eager, name=f"{name} eager", cudnn_benchmark=False)]
        if not result.dry:  # a precision of GPUs, and torch's own default in convolutions
            last += [replace(by_hand, name=f"{name} published tf32", precision="tf32")]
    measure(result, [*first, *more, *last], LARGE)
    for name, _ in cohorts:
        figures(result, name, captured=", benchmark")
    _flops(result, dict(cohorts))


def compiled(result: Result) -> None:
    """Branch ResNet-32 compiled, captured and both, with the time of compiling."""
    the_device(result)
    name, of = "branch ResNet-32", small_recipe("branch", result.dry)
    captured = Program(f"{name} captured", of, capture=True)
    both = replace(captured, name=f"{name} compiled + captured", compile=True)
    programs = [
        both,
        captured,
        Program(f"{name} compiled", of, compile=True, seconds=20),  # the compiler's cache has it
        replace(both, name=f"{name} grouped compiled + captured", engine="grouped", seconds=45),
    ]
    measure(result, programs, FULL)
    rows = {row["name"]: row for row in result.data["rows"]}
    if "ms" in rows[both.name]:
        result.figure(f"{both.name} ms", rows[both.name]["ms"])
        result.figure("first step s", rows[both.name]["first_step_seconds"])
    result.data["graphs"] = dict(torch._dynamo.utils.counters["stats"])
    result.data["graph_breaks"] = dict(torch._dynamo.utils.counters["graph_break"])


def figures(result: Result, name: str, captured: str = "") -> None:
    """Records our captured step in ms, and the ratios of the published loop's steps to it."""
    ms = {row["name"]: row["ms"] for row in result.data["rows"] if "ms" in row}
    ours = ms.get(f"{name} captured{captured}", ms.get(f"{name} eager{captured}"))
    if ours is None:
        return
    result.figure(f"{name} ms", ours)
    for precision in ("bf16", "fp32", "tf32"):
        if f"{name} published {precision}" in ms:
            result.figure(f"{name} over {precision}", ms[f"{name} published {precision}"] / ours)


def _flops(result: Result, cohorts: dict[str, Recipe]) -> None:
    """Adds the required FLOPs and the FLOP/s of each row's step."""
    for name, of in cohorts.items():
        flops = step_flops(of)
        for row in result.data["rows"]:
            if row["name"].startswith(name):
                row["tflop"] = flops / 1e12
                if "ms" in row:
                    row["tflops"] = flops / row["ms"] / 1e9
    result.write()


def warm() -> None:
    """Compiles the loss's kernels for the timed steps, in advance."""
    for B, C, d in ((128, 100, 8), (256, 1000, 64)):
        logits_SBC = torch.randn(STUDENTS, B, C, device="cuda", dtype=torch.bfloat16)
        labels_B = torch.zeros(B, device="cuda", dtype=torch.int64)
        query, key = (
            torch.randn(B, STUDENTS - 1, d, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        leaves = [x.requires_grad_() for x in (logits_SBC, query, key)]
        loss = ops.peer_attention_distillation(logits_SBC, labels_B, query, key)
        torch.autograd.grad(loss.total, leaves)


if __name__ == "__main__":
    warm()
