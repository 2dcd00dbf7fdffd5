"""Whole fp32 training steps, our ops against PyTorch's (``--impl torch``), for CPUs without bf16.

    FASTOKD_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \\
    MKL_ENABLE_INSTRUCTIONS=AVX2 python -m bench.bench_fp32_step [--rounds N] [--threads N] \\
        [--cpu-time] [--json FILE]

Both run in turn in one process, by the loop engine, on the same drawn batch. The variables make a newer
CPU run what one with AVX2 does: our kernels, and PyTorch's. A ratio is the median of the rounds'
ratios, its spread their quartiles.
"""

from __future__ import annotations

import gc

from bench.turns import Clock, Row, in_turn, main, summary
from fastokd.benchmark.loops import OurLoop
from fastokd.recipe.names import recipe
from fastokd.run.options import RunOptions

# The claims' recipes, and one of each other family of models; the batch, small where a step is long.
RECIPES = {
    "okddip-branch/resnet32/cifar100": 64,
    "okddip-network/resnet32/cifar100": 32,
    "ffsd/resnet32/cifar100": 32,
    "okddip-network@2/resnet18/imagenet": 4,
    "okddip-branch/resnet110/cifar100": 16,
    "okddip-branch/vgg16/cifar10": 32,
    "okddip-branch/densenet_40_12/cifar10": 16,
    "okddip-branch/wrn_20_8/cifar10": 8,
}


def step_row(name: str, batch: int, rounds: int, clock: Clock) -> Row:
    """One recipe's step by PyTorch's ops (``eager``) and by ours (``cpp``)."""
    of = recipe(name, batch_size=batch)
    loops = {
        key: OurLoop(
            of, RunOptions(engine="loop", compile=False, device="cpu", precision="fp32", impl=impl)
        )
        for key, impl in (("eager", "torch"), ("cpp", "auto"))
    }
    row = summary(
        f"{name}, B {batch}", in_turn({k: v.step for k, v in loops.items()}, rounds, clock)
    )
    loops.clear()
    gc.collect()
    return row


def rows_of(rounds: int, clock: Clock) -> list[Row]:
    return [step_row(name, batch, rounds, clock) for name, batch in RECIPES.items()]


if __name__ == "__main__":
    main(__doc__ or "", rows_of)
