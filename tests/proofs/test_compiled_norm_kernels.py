"""Machine code of ``fused_bn_act``'s kernels, for GPUs that aren't here.

``python -m tests.proofs.test_compiled_norm_kernels`` prints the table of docs/kernels.md.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.proofs.offline import TARGETS, compiling_for, facts, skip_where_triton_spills
from tests.proofs.test_compiled_map_kernels import print_table

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
Case = tuple[int, int, torch.dtype, bool]


def norm(C: int, side: int, dtype: torch.dtype, residual: bool, B: int = 128) -> None:
    """Every launch of a norm with a ReLU: forward, backward and in eval mode."""
    from fastokd.kernels import fused_bn_act as kernel

    x_BCHW = torch.zeros(B, C, side, side, dtype=dtype).to(memory_format=torch.channels_last)
    add_BCHW = x_BCHW if residual else None
    state: tuple[Tensor, ...] = (torch.zeros(C),) * 4
    count = torch.zeros((), dtype=torch.long)
    _, stats, bits = kernel.fused_bn_act(x_BCHW, *state, count, add_BCHW, True, 0.1, 1e-5)
    sign = bits if residual else None
    kernel.fused_bn_act_backward(x_BCHW, x_BCHW, sign, state[0], stats, True, True, residual)
    kernel.fused_bn_act_eval(x_BCHW, *state, add_BCHW, True, 1e-5)


# ResNet-32's first stage; channels in blocks; a ragged last block, whose rows are aligned to 8 bytes;
# rows that are not aligned.
CASES: dict[str, Case] = {
    "16x32x32 bf16": (16, 32, BF16, False),
    "16x32x32 bf16 + residual": (16, 32, BF16, True),
    "64x8x8 bf16": (64, 8, BF16, False),
    "64x8x8 bf16 + residual": (64, 8, BF16, True),
    "64x8x8 fp16 + residual": (64, 8, FP16, True),
    "64x8x8 fp32": (64, 8, FP32, False),
    "64x8x8 fp32 + residual": (64, 8, FP32, True),
    "100x5x5 bf16 + residual": (100, 5, BF16, True),
    "3x9x9 bf16 + residual": (3, 9, BF16, True),
}


@pytest.mark.proof
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_machine_code(name: str, target: str) -> None:
    skip_where_triton_spills(target)
    C = CASES[name][0]
    found = facts(lambda: norm(*CASES[name]), target)
    assert len(found) == 5
    width = 8 if C % 8 else 16
    for kernel in found:
        assert kernel.spills == 0, kernel
        assert kernel.atomics == 0, kernel
        assert kernel.products == 0, kernel
        assert kernel.registers <= 255, kernel
        if C % 4 == 0:
            # Two programs of 256 threads fit one SM.
            assert kernel.registers <= 128, kernel
            assert kernel.width("loads") >= width, kernel
            if kernel.kernel in ("normalise_kernel", "gradient_kernel"):
                assert kernel.width("stores") == width, kernel


@pytest.mark.proof
def test_another_batch_does_not_recompile() -> None:
    with compiling_for("sm_90") as kernels:
        for B in (128, 80, 17, 2):
            norm(64, 8, BF16, True, B)
    assert len({id(kernel) for kernel in kernels}) == len(kernels) // 4


if __name__ == "__main__":
    print_table({name: lambda case=case: norm(*case) for name, case in CASES.items()})  # type: ignore[misc]
