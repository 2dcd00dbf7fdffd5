"""The machine's peak: the fastest of several 2048^3 matrix products, timed between the steps."""

from __future__ import annotations

import time

import torch

from fastokd.device import CASTS
from fastokd.run.trial import synchronize

SIDE = 2048


class MatmulPeak:
    """FLOP/s of the fastest product so far, in the dtype of ``precision``."""

    def __init__(self, device: torch.device, precision: str, side: int = SIDE) -> None:
        self.device = device
        self.flops = 2 * side**3
        self.repeats = 50 if device.type == "cuda" else 1
        dtype = CASTS.get(precision, torch.float32)
        self.a, self.b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        self.out = torch.empty_like(self.a)
        self.best = 0.0
        self._once()

    def _once(self) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.repeats):
            torch.mm(self.a, self.b, out=self.out)
        synchronize(self.device)
        return (time.perf_counter() - start) / self.repeats

    def measure(self) -> None:
        """Times one more product."""
        self.best = max(self.best, self.flops / self._once())
