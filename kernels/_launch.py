"""What launchers share: the device that they run on, the fused loss's block size, compiler options."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def on_device(launcher: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Runs a launcher with the device of its first tensor as the current one.

    Triton compiles for the current device and launches on it, whatever device the arguments are on.
    The first argument is a tensor or a sequence of tensors.
    """

    @functools.wraps(launcher)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first: Any = args[0]
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
            return launcher(*args, **kwargs)

    return run


def warp_size() -> int:
    """Threads in a warp of the device that kernels are compiled for."""
    if triton.knobs.runtime.interpret:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)


def block_and_warps(N: int, C: int, pairs: bool, warp: int) -> tuple[int, int]:
    """``(block, warps)`` for N sources of C classes; ``pairs``: probabilities are mixed.

    A thread holds ``each`` classes of every source twice, as logits and as gradients, and twice more
    where probabilities are mixed. ``block`` is at least C where the rows then fit the
    registers. With many sources more threads share the score tiles too.
    """
    wide = warp == 32
    if pairs:
        each = (8 if wide else 4) if N <= 4 else (4 if wide else 2) if N <= 8 else 1
        limit = 2048 if N <= 4 else 1024 if N <= 8 else 256
    else:
        each, limit = (8, 2048) if N <= 4 or (wide and N == 5) else (4, 1024)
    block = max(triton.next_power_of_2(C), 4 * warp)
    if N > 8 and block > limit:  # more is kept between sweeps
        if pairs:
            return (256 if wide else 512), 8
        return 512, (8 if wide else 4)
    block = min(block, 1024) if block > limit else block
    if N > 8 and not wide and block > 256:
        return block, 8
    return block, max(block // (each * warp), (2 if wide else 4) if N > 8 else 1)


def query_columns(tile: int, warp: int) -> int:
    """Columns of queries and keys that a program multiplies at once, for a tile of peers."""
    return 64 if tile <= 8 else (8 if warp == 32 else 4)


def compiler_options(warps: int, warp: int) -> dict[str, int]:
    """``num_warps``; on NVIDIA also ``maxnreg``, so that ptxas doesn't spill."""
    return {"num_warps": warps, "maxnreg": 255} if warp == 32 else {"num_warps": warps}
