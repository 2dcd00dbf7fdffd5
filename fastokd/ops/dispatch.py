"""Which implementation of an op serves a call, and why the others don't."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from fastokd.errors import UserError
from fastokd.ops import cpp

IMPLS = ("torch", "cpp", "triton")


def unavailable(impl: str, device: torch.device) -> str | None:
    """Why ``impl`` can't run on ``device`` in this process, or None where it can."""
    if impl == "torch":
        return None
    if impl == "cpp":
        return cpp.load() if device.type == "cpu" else "it runs on the CPU only"
    if device.type == "cuda":
        return None
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"it needs a GPU (the tensors are on {device.type}) or TRITON_INTERPRET=1"


# What torch.compiler.assume_constant_result sets, without importing the compiler: a compiled step takes
# the result as a constant and doesn't trace the search for the library.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(op: str, impl: str, device: torch.device, refusals: Mapping[str, str | None]) -> str:
    """The implementation that serves this call.

    ``refusals`` gives for each fast implementation the reason why it can't take these arguments,
    or None. ``impl="auto"`` takes the device's fast one if it can serve, else ``torch``; a name takes
    that one, or raises with the reason.
    """
    if impl == "auto":
        fast = "triton" if device.type == "cuda" else "cpp"
        if fast in refusals and refusals[fast] is None and unavailable(fast, device) is None:
            return fast
        return "torch"
    if impl not in IMPLS:
        raise UserError(f"impl is {impl!r}: choose auto, {', '.join(IMPLS[:-1])} or {IMPLS[-1]}")
    if impl == "torch":
        return impl
    reason = unavailable(impl, device)
    if reason is None:
        reason = refusals.get(impl, "the op has no such implementation")
    if reason is not None:
        raise UserError(f"{op} can't run as impl={impl!r}: {reason}; impl='auto' would run")
    return impl
