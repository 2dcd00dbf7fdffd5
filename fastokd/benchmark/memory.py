"""The memory that a step needs, without the imports."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


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
