"""No step hands an operator a dtype that its CUDA kernel lacks, where the CPU's has it.

The steps run on the CPU by the operators that a GPU's step dispatches (``impl="torch"``). Every
operator whose kernels differ between devices has a row below, taken from PyTorch's CUDA sources
(the files named are in ``aten/src/ATen/native/cuda``); a private operator without a row fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastokd.benchmark.loops import OurLoop
from fastokd.learner.guard import Guard
from fastokd.run.options import RunOptions
from tests.learner.every_method import READERS, small

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
I32, I64 = torch.int32, torch.int64
WIDE = {F32, F64}
FLOATS = {F16, BF16, *WIDE}
NUMBERS = {*FLOATS, I32, I64}

# What each tensor argument may be. An operator by its name without the overload.
CUDA_TAKES: dict[str, set[torch.dtype]] = {
    # AmpKernels.cu: AT_DISPATCH_FLOATING_TYPES_AND_HALF; the flag and the scale are float32.
    "_amp_foreach_non_finite_check_and_unscale_": {F16, *WIDE},
    "_amp_update_scale_": {F32, I32},
    # FusedSgdKernel.cu, FusedAdamKernel.cu: any float, but a tensor rate and the counts are float32.
    "_fused_sgd_": FLOATS,
    "_fused_adam_": FLOATS,
    # ForeachBinaryOpScalar.cu, ...List.cu, ...ScalarTensor.cu, ForeachUnaryOp.cu, ForeachCopy.cu
    "_foreach_add_": NUMBERS,
    "_foreach_sub": NUMBERS,
    "_foreach_sub_": NUMBERS,
    "_foreach_mul": NUMBERS,
    "_foreach_mul_": NUMBERS,
    "_foreach_copy_": NUMBERS,
    "_foreach_norm": FLOATS,  # ForeachReduceOp.cu
    "_log_softmax": FLOATS,  # SoftMax.cu
    "_log_softmax_backward_data": FLOATS,
    "_softmax": FLOATS,
    "_softmax_backward_data": FLOATS,
    "kthvalue": NUMBERS,  # Sorting.cu
    "sort": {*NUMBERS, torch.bool},  # Sort.cu
    "topk": NUMBERS,  # TensorTopK.cu
    "scatter_add": {*NUMBERS, torch.bool},  # ScatterGatherKernel.cu
    "gather": {*NUMBERS, torch.bool},
    "linalg_vector_norm": FLOATS,  # ReduceNormKernel.cu
}
# Views and casts, which every dtype has.
ANY_DTYPE = {"_to_copy", "_unsafe_view", "_reshape_alias", "_local_scalar_dense"}


class CudaDtypes(TorchDispatchMode):
    """Fails at an operator that CUDA has no kernel for; counts the calls that have a row."""

    def __init__(self) -> None:
        super().__init__()
        self.checked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        if func.namespace == "aten" and name in CUDA_TAKES:
            self.checked += 1
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            lacking = {x.dtype for x in tensors} - CUDA_TAKES[name]
            assert not lacking, f"CUDA's {func} takes no {lacking}"
            rate = kwargs.get("lr")
            assert not isinstance(rate, Tensor) or rate.dtype == F32, f"{func} reads a float32 rate"
        else:
            private = func.namespace == "aten" and name.startswith("_") and name not in ANY_DTYPE
            assert not private, f"{func} is private: add what CUDA's kernel takes"
        return func(*args, **kwargs)


@pytest.mark.parametrize("method", [*READERS, "mcl", "dist"])
def test_every_operator_of_a_step_has_a_cuda_kernel(method: str) -> None:
    """In fp16, with its scale; in bf16 every method's steps are watched in test_sync_free.py."""
    options = RunOptions(device="cpu", precision="fp16", engine="loop", impl="torch", clip_norm=1.0)
    loop = OurLoop(small(method, "network", ema=0.9), options)
    with CudaDtypes() as seen:
        loop.step()
        loop.step()
    assert seen.checked > 20


def test_the_guard_finds_what_is_not_finite_in_every_dtype() -> None:
    for dtype in (F16, BF16, F32, F64):
        for value, raised in ((1.0, 0), (float("nan"), 1), (float("inf"), 1)):
            guard = Guard(torch.device("cpu"))
            with CudaDtypes():
                guard.check([torch.full((3,), value, dtype=dtype), torch.ones(2)])
            assert guard.fault == raised


def test_the_watch_sees_a_missing_kernel(tmp_path: Path) -> None:
    x, flag, one = torch.ones(2, dtype=BF16), torch.zeros(()), torch.ones(())
    with pytest.raises(AssertionError, match="takes no"), CudaDtypes():
        torch._amp_foreach_non_finite_check_and_unscale_([x], flag, one)
    with pytest.raises(AssertionError, match="is private"), CudaDtypes():
        torch._foreach_exp([x])
