"""What a step is measured against: the fastest of several 2048^3 matrix products, the peak of the CPU's
instructions, and the peak of a step's memory."""

from __future__ import annotations

import os
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fastokd.device import CASTS, synchronize
from fastokd.ops import cpp

SIDE = 2048
STATUS = Path("/proc/self/status")


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


class InstructionPeak:
    """FLOP/s of the CPU's multiply-adds in the dtype of ``precision``, on registers, all threads at once:
    what no product can exceed. None where that isn't known: on a GPU, without the C++ ops or with another
    instruction set than the CPU's, and where matrix products have an instruction that this doesn't run (AMX)."""

    ROUNDS = 4_000_000

    def __init__(self, device: torch.device, precision: str) -> None:
        self.bf16 = precision == "bf16"
        amx = bool(torch.cpu.get_capabilities().get("amx_bf16"))
        lowered = "FASTOKD_CPU_CAPABILITY" in os.environ  # ours, and not torch's
        other = (amx and self.bf16) or precision == "fp16"
        self.known = device.type == "cpu" and not lowered and not other
        self.best: float | None = None

    def measure(self) -> None:
        """Times the instructions once more."""
        if not self.known:
            return
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(self._run, [1] * threads))  # the threads are started
            start = time.perf_counter()
            flops = sum(pool.map(self._run, [self.ROUNDS] * threads))
            seconds = time.perf_counter() - start
        if flops:
            self.best = max(self.best or 0.0, flops / seconds)

    def _run(self, rounds: int) -> int:
        return cpp.multiply_adds(rounds, bf16=self.bf16)


class PeakMemory:
    """The peak of memory since this object was made, in bytes.

    On a GPU: torch's allocations. On a CPU: the growth of the process's resident set; make the
    object after the imports, in a process that does nothing else.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self.before = _status("VmRSS") if STATUS.exists() else _high_water()

    def read(self) -> int:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # getrusage counts what the process had before exec too; /proc doesn't.
        return (_status("VmHWM") if STATUS.exists() else _high_water()) - self.before


def _status(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


def _high_water() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
