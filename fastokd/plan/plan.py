"""``fastokd plan``: a recipe's step on a device, counted on fake tensors and modelled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastokd.benchmark.step import step_flops, step_macs
from fastokd.benchmark.synthetic import num_classes
from fastokd.cohort.cohort import ENGINES
from fastokd.errors import UserError
from fastokd.learner.build import build_cohort
from fastokd.methods import method_class
from fastokd.models import least_batch, model_info
from fastokd.ops import cpp
from fastokd.plan.devices import Device, Gpu, find_device
from fastokd.plan.ops import Op
from fastokd.plan.roofline import (
    fuse,
    gradient_traffic,
    launches,
    student_traffic,
    terms,
)
from fastokd.plan.trace import Step, trace_ours, trace_reference
from fastokd.recipe.names import Recipe

REPLAYS = 2
TRAIN_IMAGES = {
    "cifar10": 50_000,
    "cifar100": 50_000,
    "digits": 500,
    "fashion_mnist": 60_000,
    "imagenet": 1_281_167,
}


def plan(of: Recipe, device_name: str, gpus: int = 1) -> dict[str, Any]:
    """Everything that the command prints, under ``counted`` and ``modelled``.

    The recipe's batch is that of the whole step; ``gpus`` share it.

    Raises:
        UserError: students that can't take the images, or that the method refuses; an unknown
            device; fewer than one GPU, or more than images in a batch; several CPUs.
    """
    if gpus < 1:
        raise UserError(f"gpus is {gpus}: it must be at least 1")
    if gpus > of.batch_size:
        raise UserError(
            f"gpus is {gpus}, but a batch has {of.batch_size} images: give a --batch-size of at "
            f"least {gpus}"
        )
    device = find_device(device_name)
    if gpus > 1 and not isinstance(device, Gpu):
        raise UserError(f"gpus is {gpus}, but the device is cpu: name a GPU, or leave --gpus out")
    for name in dict.fromkeys(of.models):  # a student that can't take the images is refused here
        least_batch(name, num_classes(of), of.model_options, (of.image_size, of.image_size))
    cpp.ensure_built()  # without it the norm and the loss are traced as PyTorch's operators
    batch = math.ceil(of.batch_size / gpus)
    steps = _steps(of, batch, device)
    if isinstance(steps["loop"], str):
        raise UserError(steps["loop"])  # the method refuses these students
    best = _modelled(of, batch, gpus, device, steps)
    return {
        "recipe": of.name,
        "device": device.name,
        "precision": device.precision,
        "gpus": gpus,
        "batch_size": of.batch_size,
        "batch_size_per_gpu": batch,
        "counted": _counted(of, batch, steps, device),
        "modelled": best,
    }


def _steps(of: Recipe, batch: int, device: Device) -> dict[str, Step | str]:
    """Traces by name; the reason where an engine can't take the recipe."""
    on_gpu = isinstance(device, Gpu)
    found: dict[str, Step | str] = {}
    for engine in ENGINES:
        norm = "torch" if on_gpu else "auto"
        found[engine] = _or_reason(trace_ours, of, batch, engine, device.precision, norm)
        if on_gpu:  # as the compiler has it: the norm reads twice and writes once
            found[f"{engine} fused"] = _or_reason(
                trace_ours, of, batch, engine, device.precision, "auto"
            )
    found["reference"] = _or_reason(trace_reference, of, batch, "fp32", on_gpu)
    return found


def _or_reason(trace: Callable[..., Step], *args: Any) -> Step | str:
    """The trace, or why there is none."""
    try:
        return trace(*args)
    except UserError as error:
        return str(error)


def _counted(
    of: Recipe, batch: int, steps: dict[str, Step | str], device: Device
) -> dict[str, Any]:
    loop = steps["loop"]
    assert isinstance(loop, Step)
    counts: dict[str, Any] = {}
    for name in (*ENGINES, "reference"):
        step = steps[name]
        counts[name] = step if isinstance(step, str) else launches(step.ops)
    return {
        "parameters": loop.parameters,
        "macs_per_image": step_macs(of),
        "flops": step_flops(of) * batch / of.batch_size,
        "executed_flops": loop.flops,
        "bytes": loop.bytes,
        "parameter_bytes": loop.parameter_bytes,
        "gradient_bytes": loop.gradient_bytes,
        "optimizer_bytes": loop.state_bytes,
        "activation_bytes": loop.activation_bytes,
        "peak_bytes": loop.peak_bytes,
        "fits": loop.peak_bytes <= device.memory_bytes,
        "memory_bytes": device.memory_bytes,
        "launches_eager": counts,
        "layers": layers(loop.ops),
    }


def layers(ops: Sequence[Op]) -> list[dict[str, Any]]:
    """FLOPs and bytes of each layer, forward and backward; students' layers of one name together."""
    rows: dict[str, dict[str, Any]] = {}
    for op in ops:
        parts = op.layer.split(".")
        if parts[0] == "students" and len(parts) > 1:
            parts[1] = "*"
        name = ".".join(parts) or f"({op.phase})"
        row = rows.setdefault(name, {"layer": name, "flops": 0, "bytes": 0, "launches": 0})
        row["flops"] += op.flops
        row["bytes"] += op.bytes
        row["launches"] += op.launches
    return list(rows.values())


def _modelled(
    of: Recipe, batch: int, gpus: int, device: Device, steps: dict[str, Step | str]
) -> dict[str, Any]:
    ways = {}
    for name in (*ENGINES, "reference"):
        step = steps[name]
        if isinstance(step, str):
            continue
        ways[name] = _way(step.ops, device, launches(step.ops))
        fused = steps.get(f"{name} fused")
        if isinstance(fused, Step) and isinstance(device, Gpu):
            # Two replays, of the forward with the loss and of the backward, then the optimizer's.
            kernels = fuse(fused.ops)
            alone = [op for op in kernels if op.kind == "optimizer"]
            ways[f"{name} compiled"] = {
                **_way(kernels, device, REPLAYS + launches(alone)),
                "graph_replays": REPLAYS,
            }
    loop = steps["loop"]
    assert isinstance(loop, Step)
    traffic = gradient_traffic(loop.gradient_bytes, gpus, device)
    across = None
    if of.sharing == "network" and of.students > 1:
        across = student_traffic(of, _exchanged(of), _shared_bytes(of), gpus, device)
    ours = {name: way for name, way in ways.items() if not name.startswith("reference")}
    fastest = min(ours, key=lambda name: ours[name]["step_ms"])
    seconds = ours[fastest]["step_ms"] / 1e3 + traffic.seconds
    return {
        "how": device.how,
        "ways": ways,
        "fastest": fastest,
        "gradient_traffic_bytes": traffic.bytes,
        "gradient_traffic_ms": 1e3 * traffic.seconds,
        "students_across_gpus_bytes": None if across is None else across.bytes,
        "students_across_gpus_ms": None if across is None else 1e3 * across.seconds,
        "images_per_second": of.batch_size / seconds,
        "hours": _hours(of, seconds),
    }


def _exchanged(of: Recipe) -> int:
    """Numbers that students tell each other about an image: logits and features, and the last
    map where the method compares maps."""
    infos = [model_info(name, num_classes(of), **of.model_options) for name in of.models]
    with_maps = method_class(of.method).needs.maps
    return sum(
        num_classes(of) + info.feature_dim + (math.prod(info.maps[-1]) if with_maps else 0)
        for info in infos
    )


def _shared_bytes(of: Recipe) -> int:
    """Of the method's weights that no student has for itself, in float32."""
    with torch.device("meta"):
        _, method = build_cohort(of, num_classes(of), image_size=of.image_size)
    return 4 * sum(
        parameter.numel()
        for name, parameter in method.named_parameters()
        if method.belongs_to(name) is None
    )


def _way(ops: Sequence[Op], device: Device, host: int) -> dict[str, Any]:
    """One way to run the step: its terms, and the host's own time where that is the longer."""
    found = terms(ops, device)
    work = sum(found.values())
    waiting = host * device.host_seconds if isinstance(device, Gpu) else 0.0
    return {
        "step_ms": 1e3 * max(work, waiting),
        "kernels": launches(ops),
        "device_ms": 1e3 * work,
        "host_ms": 1e3 * waiting,
        "host_launches": host,
        "terms_ms": {name: 1e3 * seconds for name, seconds in found.items()},
    }


def _hours(of: Recipe, seconds: float) -> float | None:
    """Of all epochs, evaluation and data not counted; None where the images aren't known."""
    if of.dataset not in TRAIN_IMAGES:
        return None
    steps = math.ceil((TRAIN_IMAGES[of.dataset] - of.val) / of.batch_size)
    return of.epochs * steps * seconds / 3600
