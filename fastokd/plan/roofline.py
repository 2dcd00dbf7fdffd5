"""A traced step on a device: time by term, kernels after fusion, traffic between GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastokd.plan.devices import Device, Gpu
from fastokd.plan.ops import Op
from fastokd.recipe.names import Recipe

FUSIBLE = ("pointwise", "reduction", "norm", "pool")


def terms(ops: Sequence[Op], device: Device, students: int = 1) -> dict[str, float]:
    """Expected seconds by kind of operator, the longest first.

    Operators run one after another; with ``students`` those of different students run side by side.
    """
    found: dict[str, float] = {}
    for op in ops:
        beside = students if op.layer.startswith("students.") else 1
        found[op.kind] = found.get(op.kind, 0.0) + device.seconds(op, beside)
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def launches(ops: Sequence[Op]) -> int:
    """GPU kernels of the operators, each launched alone."""
    return sum(op.launches for op in ops)


def fuse(ops: Sequence[Op]) -> list[Op]:
    """The operators as a compiler groups them: those between two products, losses or updates become
    one operator, of one kernel plus one for each reduction. Its bytes are the sum of its parts' bytes,
    an upper bound."""
    fused: list[Op] = []
    run: list[Op] = []
    for op in (*ops, None):
        if run and (op is None or op.kind not in FUSIBLE or op.phase != run[0].phase):
            size = sum(part.bytes for part in run)
            kernels = 1 + sum(part.kind != "pointwise" for part in run)
            group = replace(run[0], name="fused", kind="fused", bytes=size, launches=kernels)
            fused.append(group)
            run = []
        if op is not None and op.kind in FUSIBLE:
            run.append(op)
        elif op is not None:
            fused.append(op)
    return fused


def all_reduce(size: float, gpus: int) -> float:
    """Bytes that each GPU sends to sum ``size`` bytes over a ring: 2 (N - 1) / N of them."""
    return 2 * (gpus - 1) / gpus * size


def student_traffic(
    of: Recipe, exchanged: int, shared_bytes: int, gpus: int, device: Device
) -> float:
    """Bytes that each GPU sends in a step with ``--parallel students``: each GPU has some students and
    the whole batch.

    All GPUs gather the students' outputs, ``exchanged`` numbers an image in the step's precision,
    without gradients. The gradients of a method's shared parameters are summed.
    """
    size = 2 if device.precision in ("bf16", "fp16") else 4
    gathered = size * of.batch_size * exchanged * (gpus - 1) / gpus
    return gathered + all_reduce(shared_bytes, gpus)


def link_seconds(size: float, device: Device) -> float:
    """Seconds to send ``size`` bytes over the device's link; 0 for a CPU."""
    return size / device.link if isinstance(device, Gpu) else 0.0
