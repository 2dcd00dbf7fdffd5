"""What the launchers of the fused loss share: its options, and what fits the registers."""

from __future__ import annotations

from typing import NamedTuple

import triton
from fastokd.kernels._layout import Weight
from torch import Tensor


class Scores(NamedTuple):
    """A tensor and its strides over samples, then students and sources, or peers and d."""

    tensor: Tensor | None
    sample: int
    first: int
    second: int


class Loss(NamedTuple):
    """What makes the loss, beside the tensors it is of."""

    ce: Weight
    kd: Weight
    mixture: Weight
    temperature: tuple[Tensor | None, float]
    mix: str
    detach: bool
    smoothing: float


def warp_size() -> int:
    """Threads in a warp of the device that kernels are compiled for."""
    if triton.knobs.runtime.interpret:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)


def plan(N: int, C: int, pairs: bool, warp: int) -> tuple[int, int]:
    """``(block, warps)`` for N sources of C classes; ``pairs``: probabilities are mixed.

    A thread holds ``each`` classes of every source twice, as logits and as their gradient, and
    twice more where probabilities are mixed. ``block`` is at least C where the rows then fit the
    registers.
    """
    if pairs:
        each, limit = (8, 2048) if N <= 4 else (4, 1024) if N <= 8 else (1, 256)
    else:
        each, limit = (8, 2048) if (5 if warp == 32 else 4) >= N else (4, 1024)
    block = max(triton.next_power_of_2(C), 4 * warp)
    if block > limit:
        block = min(limit, 1024)
    return block, max(block // (each * warp), 2 if N > 8 else 1)
