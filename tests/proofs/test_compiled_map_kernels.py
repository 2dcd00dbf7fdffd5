"""Machine code of the kernels on maps, for GPUs that aren't here.

``python -m tests.proofs.test_compiled_map_kernels`` prints the table of docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.proofs.offline import TARGETS, Facts, compiling_for, facts, skip_where_triton_spills

FP32, BF16 = torch.float32, torch.bfloat16


def maps(B: int, C: int, side: int, dtype: torch.dtype, students: int = 1) -> Tensor:
    """One student's map; of several students' maps that lie side by side, the last."""
    x_BCHW = torch.zeros(B, students * C, side, side, dtype=dtype)
    return x_BCHW.contiguous(memory_format=torch.channels_last)[:, -C:]


def losses(C: int, side: int, dtype: torch.dtype, B: int = 128, students: int = 1) -> None:
    """Every launch of the map losses, with the gradients that FFSD asks for."""
    from fastokd.kernels import attention, feature_transfer

    x_BCHW = maps(B, C, side, dtype, students)
    u_BP, r_B = attention.attention_map(x_BCHW)
    attention.attention_map_backward(x_BCHW, u_BP, r_B, u_BP)
    for shift in (False, True):
        loss, s_BP, _ = attention.attention_pair(x_BCHW, x_BCHW, shift, True, False)
    attention.attention_pair_backward(x_BCHW, s_BP, loss)
    attention.shifted_map(x_BCHW)
    loss, saved_4B = feature_transfer.feature_pair(x_BCHW, x_BCHW)
    feature_transfer.feature_pair_backward(x_BCHW, x_BCHW, saved_4B, loss, True, False)


def fusion(m: int, C: int, side: int, dtype: torch.dtype, B: int = 128) -> None:
    """The fusion of m maps; one map is the transfusion's, and asks for its gradient."""
    from fastokd.kernels import fusion_step as step

    together = [maps(B, C, side, dtype) for _ in range(m)]
    weight, channel = torch.zeros(m * C, 1, 3, 3), torch.zeros(m * C)
    count = torch.zeros((), dtype=torch.long)
    norm = (weight, channel, channel)
    y, z, saved = step.fusion_step(together, *norm, channel, channel, count, 0.1, 1e-5)
    step.fusion_step_backward(y, together, *norm, z, saved, m == 1)


# ResNet-32's first and last stages; ResNet-18's, at 224 pixels, which are the largest and widest.
CASES: dict[str, Callable[[], None]] = {
    "losses 16x32x32 fp32": lambda: losses(16, 32, FP32),
    "losses 16x32x32 bf16": lambda: losses(16, 32, BF16),
    "losses 64x8x8 fp32": lambda: losses(64, 8, FP32),
    "losses 64x8x8 bf16": lambda: losses(64, 8, BF16),
    "losses 64x8x8 of 4 students bf16": lambda: losses(64, 8, BF16, students=4),
    "losses 64x56x56 fp32": lambda: losses(64, 56, FP32),
    "losses 64x56x56 bf16": lambda: losses(64, 56, BF16),
    "losses 512x7x7 bf16": lambda: losses(512, 7, BF16),
    "fusion of 2 64x8x8 fp32": lambda: fusion(2, 64, 8, FP32),
    "fusion of 2 64x8x8 bf16": lambda: fusion(2, 64, 8, BF16),
    "fusion of 4 512x7x7 bf16": lambda: fusion(4, 512, 7, BF16),
    "transfusion 64x8x8 fp32": lambda: fusion(1, 64, 8, FP32),
    "transfusion 64x8x8 bf16": lambda: fusion(1, 64, 8, BF16),
    "transfusion 512x7x7 bf16": lambda: fusion(1, 512, 7, BF16),
}
# What these store is a number a pixel, a sample or a channel.
NO_MAP_STORED = ("map_kernel", "pair_kernel", "sums_kernel", "reduce_kernel", "gradient_kernel")


@pytest.mark.proof
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_machine_code(name: str, target: str) -> None:
    skip_where_triton_spills(target)
    found = facts(CASES[name], target)
    assert found
    for kernel in found:
        assert kernel.spills == 0, kernel
        assert kernel.atomics == 0, kernel
        assert kernel.products == 0, kernel
        assert kernel.registers <= 255, kernel
        if kernel.kernel == "finish_kernel":  # it reads float64 sums of a map's stretches
            continue
        # Nine weights a channel lie together: they are gathered, a channel's map is not.
        weights = kernel.kernel == "conv_kernel"
        assert (kernel.loads[0][0] if weights else kernel.width("loads")) == 16, kernel
        if kernel.kernel not in NO_MAP_STORED:
            assert kernel.width("stores") == 16, kernel


@pytest.mark.proof
@pytest.mark.parametrize("case", [losses, fusion])
def test_another_batch_does_not_recompile(case: Callable[..., None]) -> None:
    with compiling_for("sm_90") as kernels:
        for B in (128, 80, 17, 2):
            case(*((2,) if case is fusion else ()), 64, 8, FP32, B)
    assert len({id(kernel) for kernel in kernels}) == len(kernels) // 4


def _row(name: str, kernels: tuple[Facts, ...]) -> str:
    first = kernels[0]
    widths = " | ".join(f"{first.width(accesses)} B" for accesses in ("loads", "stores"))
    registers = ", ".join(str(kernel.registers) for kernel in kernels)
    spills = max(kernel.spills for kernel in kernels)
    return f"| {name} | {first.kernel} | {first.warps} | {registers} | {spills} | {widths} |"


def print_table(cases: dict[str, Callable[[], None]]) -> None:
    """A row for each kernel that each of the cases launches."""
    print(
        f"| launch | kernel | warps | registers on {', '.join(TARGETS)} | spills | loads | stores |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, case in cases.items():
        for kernels in zip(*(facts(case, target) for target in TARGETS), strict=True):
            print(_row(name, kernels), flush=True)


if __name__ == "__main__":
    print_table(CASES)
