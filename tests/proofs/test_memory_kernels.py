"""Machine code, launches and bytes of the kernels of MCL's memory form, for GPUs that aren't here.

``python -m tests.proofs.test_memory_kernels`` prints the tables of docs/kernels.md.
"""

from __future__ import annotations

import pytest
import torch

from tests.proofs.offline import TARGETS, compiling_for, facts, skip_where_triton_spills
from tests.proofs.test_compiled_map_kernels import print_table
from tests.proofs.test_launches import Count, Head

FP32, BF16 = torch.float32, torch.bfloat16


def contrast(S: int, D: int, dtype: torch.dtype, B: int = 4, K: int = 8194) -> Head:
    """The launches of A and its gradient; their bytes by design."""
    from fastokd.kernels import memory_contrast as kernel

    x_SBD, memory_SND = torch.zeros(S, B, D), torch.zeros(S, 9, D, dtype=dtype)
    index_BK = torch.zeros(B, K, dtype=torch.long)
    A_SSBK = kernel.memory_similarities(x_SBD, memory_SND, index_BK, 1.0)
    dx_SBD = kernel.memory_similarities_backward(A_SSBK, memory_SND, index_BK, 1.0)
    rows = S * B * K * (D * memory_SND.element_size() + 8)  # of each memory, with their numbers
    return Head(3, 2 * (rows + A_SSBK.nbytes) + x_SBD.nbytes + dx_SBD.nbytes)


def gathered(S: int, D: int, B: int, K: int) -> int:
    """Bytes of the reference in fp32: the gather reads and writes the rows, two products read them; kept
    are [B, K, D] for each student between forward and backward."""
    return S * B * (4 * K * D * 4 + 2 * K * 8 + 2 * S * K * 4)


# The recipe on ImageNet with two and four students; MCL-OKD's; a ragged width; a memory in bf16.
CASES = {
    "S2 D128 fp32": (2, 128, FP32),
    "S4 D128 fp32": (4, 128, FP32),
    "S4 D128 bf16": (4, 128, BF16),
    "S8 D256 fp32": (8, 256, FP32),
    "S2 D100 fp32": (2, 100, FP32),
}


@pytest.mark.proof
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_machine_code(name: str, target: str) -> None:
    skip_where_triton_spills(target)
    found = facts(lambda: contrast(*CASES[name]), target)
    assert [kernel.kernel for kernel in found] == ["similarities_kernel", "gradient_kernel"]
    for kernel in found:
        assert kernel.spills == 0, kernel
        assert kernel.atomics == 0, kernel
        assert kernel.products == 0, kernel
        assert kernel.registers <= 168, kernel  # three programs of 128 threads fit an SM
        assert kernel.loads[0][0] == 16, kernel


@pytest.mark.proof
def test_another_batch_or_number_of_rows_does_not_recompile() -> None:
    with compiling_for("sm_90") as kernels:
        for B, K in ((4, 8194), (3, 4098), (64, 16385)):
            contrast(2, 128, FP32, B, K)
    assert len({id(kernel) for kernel in kernels}) == 2


@pytest.mark.proof
def test_launches_and_bytes() -> None:
    with compiling_for("sm_90") as kernels, Count() as count:
        ours = contrast(2, 128, FP32)
    assert len(kernels) == 2
    assert count.launches == 3 + 1  # three tensors of zeros, and the sum of the parts
    assert gathered(2, 128, 4, 8194) > 1.9 * ours.bytes


if __name__ == "__main__":
    B, K = 256, 8194
    print("| | launches | GB: gathered, ours | kept for backward, GB: gathered, ours |")
    print("|---|---|---|---|")
    for S in (2, 4):
        with compiling_for("sm_90"):
            ours = contrast(S, 128, FP32, B, K)
        kept, index = S * B * K * 128 * 4, B * K * 8
        both = f"{gathered(S, 128, B, K) / 1e9:.2f}, {ours.bytes / 1e9:.2f}"
        print(f"| S {S} | {ours.launches} | {both} | {kept / 1e9:.2f}, {index / 1e9:.3f} |")
    print()
    print_table({name: lambda case=case: contrast(*case) for name, case in CASES.items()})  # type: ignore[misc]
