"""Machine code, launches and bytes of max pooling's kernels, for GPUs that aren't here.

``python -m tests.proofs.test_pool_kernels`` prints the tables of docs/kernels.md.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.proofs.offline import TARGETS, compiling_for, facts, skip_where_triton_spills
from tests.proofs.test_compiled_map_kernels import print_table
from tests.proofs.test_launches import Count, Head

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LAST = torch.channels_last
Case = tuple[int, int, int, torch.dtype]


def pool(C: int, side: int, stride: int, dtype: torch.dtype, B: int = 64) -> Head:
    """Both launches; their bytes by design."""
    from fastokd.kernels import max_pool as kernel

    x_BCHW = torch.zeros(B, C, side, side, dtype=dtype).to(memory_format=LAST)
    y_BCHW, taps_BCHW = kernel.max_pool(x_BCHW, stride)
    kernel.max_pool_backward(y_BCHW, taps_BCHW, stride, side, side)
    # x, y and the taps; dy, the taps and dx.
    return Head(2, 2 * (x_BCHW.nbytes + y_BCHW.nbytes + taps_BCHW.nbytes))


def eager(C: int, side: int, stride: int, dtype: torch.dtype, B: int = 64) -> Head:
    """PyTorch's, with the launch by which a GPU's backward clears the gradient that it adds to."""
    x_BCHW = torch.zeros(B, C, side, side, dtype=dtype).to(memory_format=LAST).requires_grad_()
    with Count() as count:
        y_BCHW = F.max_pool2d(x_BCHW, 3, stride, 1)
        grad_BCHW = y_BCHW.detach()
        torch.autograd.grad(y_BCHW, x_BCHW, grad_BCHW)
    return Head(count.launches + 1, count.bytes + x_BCHW.nbytes)


# The stem of ResNet-18 and 34 at 224 pixels; GoogLeNet's narrowest and widest pools; a ragged block of
# channels, whose rows are aligned to 8 bytes; rows that are not aligned.
CASES: dict[str, Case] = {
    "64x112x112 bf16": (64, 112, 2, BF16),
    "64x112x112 fp16": (64, 112, 2, FP16),
    "64x112x112 fp32": (64, 112, 2, FP32),
    "192x32x32 bf16, stride 1": (192, 32, 1, BF16),
    "832x8x8 bf16, stride 1": (832, 8, 1, BF16),
    "100x14x14 bf16": (100, 14, 2, BF16),
    "3x9x9 bf16": (3, 9, 2, BF16),
}


@pytest.mark.proof
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_machine_code(name: str, target: str) -> None:
    skip_where_triton_spills(target)
    C, _, stride, dtype = CASES[name]
    found = facts(lambda: pool(*CASES[name]), target)
    assert [kernel.kernel for kernel in found] == ["pool_kernel", "gradient_kernel"]
    for kernel in found:
        assert kernel.spills == 0, kernel
        assert kernel.atomics == 0, kernel
        assert kernel.products == 0, kernel
        assert kernel.registers <= 168, kernel  # three programs of 128 threads fit an SM
        if C % 4 == 0:
            assert kernel.width("loads") == kernel.width("stores") == (8 if C % 8 else 16), kernel
    if C % 8 == 0 and target != "gfx942" and dtype != FP32:
        # Three taps of three input rows, of which one (two with stride 1) are loaded before the loop
        # over output rows and kept; gradient and tap of each window around an output's place, once.
        forward, backward = (sum(n for _, n in kernel.loads) for kernel in found)
        assert (forward, backward) == (9, 2 * (9 if stride == 1 else 4))


@pytest.mark.proof
def test_another_batch_or_size_does_not_recompile() -> None:
    with compiling_for("sm_90") as kernels:
        for B, side in ((64, 112), (17, 112), (2, 56), (1, 75)):
            pool(64, side, 2, BF16, B)
    assert len({id(kernel) for kernel in kernels}) == 2


@pytest.mark.proof
def test_launches_and_bytes() -> None:
    with compiling_for("sm_90") as kernels, Count() as count:
        ours = pool(64, 112, 2, BF16, 1)
    assert len(kernels) == ours.launches
    assert count.launches == 2  # zeros for x, and in its layout
    before = eager(64, 112, 2, BF16, 1)
    assert (before.launches, ours.launches) == (3, 2)
    assert before.bytes > 2 * ours.bytes


if __name__ == "__main__":
    print("| | launches: eager, ours | MB: eager, ours |")
    print("|---|---|---|")
    for label, case in CASES.items():
        with compiling_for("sm_90"):
            ours = pool(*case)
        before = eager(*case)
        megabytes = f"{before.bytes / 1e6:.1f}, {ours.bytes / 1e6:.1f}"
        print(f"| {label}, B 64 | {before.launches}, {ours.launches} | {megabytes} |")
    print()
    print_table({name: lambda case=case: pool(*case) for name, case in CASES.items()})  # type: ignore[misc]
