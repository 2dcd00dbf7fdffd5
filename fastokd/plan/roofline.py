"""A traced step on a device: the time of each term, kernels after fusion, traffic between GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fastokd.plan.devices import Device, Gpu
from fastokd.plan.ops import Op
from fastokd.recipe.names import Recipe

FUSIBLE = ("pointwise", "reduction", "norm")


def terms(ops: Sequence[Op], device: Device) -> dict[str, float]:
    """Seconds by kind of operator, one after another."""
    found: dict[str, float] = {}
    for op in ops:
        found[op.kind] = found.get(op.kind, 0.0) + device.seconds(op)
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def launches(ops: Sequence[Op]) -> int:
    """Kernels that the operators are, one by one."""
    return sum(op.launches for op in ops)


def fuse(ops: Sequence[Op]) -> list[Op]:
    """The operators as a compiler would group them: what stands between two products, losses or
    updates becomes one operator, of one kernel and another for each reduction, whose result the
    rest waits for. Its bytes are its parts' own, more than a compiler needs."""
    fused: list[Op] = []
    run: list[Op] = []
    following: list[Op | None] = [*ops, None]
    for op in following:
        if run and (op is None or op.kind not in FUSIBLE or op.phase != run[0].phase):
            fused.append(
                dataclasses.replace(
                    run[0],
                    name="fused",
                    kind="fused",
                    bytes=sum(part.bytes for part in run),
                    launches=1 + sum(part.kind != "pointwise" for part in run),
                )
            )
            run = []
        if op is not None and op.kind in FUSIBLE:
            run.append(op)
        elif op is not None:
            fused.append(op)
    return fused


@dataclass(frozen=True)
class Traffic:
    """Bytes that a GPU sends in one step, and the seconds at its link's speed."""

    bytes: float
    seconds: float


def all_reduce(size: float, gpus: int) -> float:
    """Bytes that each GPU of a ring sends: 2 (N - 1) / N of the tensor."""
    return 2 * (gpus - 1) / gpus * size


def gradient_traffic(gradient_bytes: int, gpus: int, device: Device) -> Traffic:
    """Data parallel: every gradient is summed over the GPUs."""
    return _over_the_link(all_reduce(gradient_bytes, gpus), device)


def student_traffic(
    of: Recipe, exchanged: int, shared_bytes: int, gpus: int, device: Device
) -> Traffic:
    """Students spread over the GPUs, each GPU with the whole batch (``--parallel students``).

    Everybody gathers what the students show each other, ``exchanged`` numbers an image in the step's
    precision; nothing returns. The gradient of what the students share of a method is summed.
    """
    size = 2 if device.precision in ("bf16", "fp16") else 4
    gathered = size * of.batch_size * exchanged * (gpus - 1) / gpus
    return _over_the_link(gathered + all_reduce(shared_bytes, gpus), device)


def _over_the_link(size: float, device: Device) -> Traffic:
    return Traffic(size, size / device.link if isinstance(device, Gpu) else 0.0)
